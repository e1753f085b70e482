"""Hugging Face checkpoints as memory maps: which tensor goes where, read slice by slice.

Nothing here holds a model: `Weights.read(name, start, stop)` gives a flat slice of one of the stack's parameters, cast
after slicing, so that W ZeRO-3 ranks together read each file once.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, M2M100Config, PreTrainedConfig

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.data.shards import sha256_of
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model.encoder import ACTIVATIONS
from mtllm_engine.model.lora import initial_adapter
from mtllm_engine.model.mtllm import Stack, TaskParts
from mtllm_engine.tasks import Task, load_task

FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.model")
RUN_FILES = ("adapter_model.safetensors", "projection.safetensors", "head.safetensors")
HEAD = "objective.head.weight"
EMBEDDING_SAMPLE = 1 << 24  # numbers of the LLM's embedding that stand for all of it
LINEARS = {  # our fused linears and what they hold, by Llama's names
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Checkpoint:
    """The tensors of a folder.

    Args:
        files: By default those of a Hugging Face model: `model.safetensors`, its sharded form, or `pytorch_model.bin`.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in _weight_files(folder) if files is None else files:
            self._files.update(dict.fromkeys(_tensor_names(path), path))
        self._open: dict[Path, Mapping] = {}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises: ValueError: There is no such tensor."""
        tensor = self._tensor(name)
        return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the file's dtype; touches only the rows they lie in."""
        tensor, shape = self._tensor(name), self.shape(name)
        if not hasattr(tensor, "get_shape"):
            return tensor.reshape(-1)[start:stop]
        row = math.prod(shape[1:])
        first = start // row
        rows = tensor[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _tensor(self, name: str):
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open(path)
        opened = self._open[path]
        return opened[name] if isinstance(opened, dict) else opened.get_slice(name)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parameter's origin: tensors of one checkpoint, stacked along the first dimension."""

    checkpoint: Checkpoint
    names: tuple[str, ...]

    def check(self, parameter_name: str, shape: Sequence[int]) -> None:
        """Raises: ValueError: A tensor is missing or does not fit."""
        shapes = [self.checkpoint.shape(name) for name in self.names]
        stacked = (sum(item[0] for item in shapes), *shapes[0][1:])
        if stacked != tuple(shape):
            names = ", ".join(self.names)
            raise ValueError(
                f"{self.checkpoint.folder}: {names} has shape {stacked}, the model's {parameter_name} {tuple(shape)}"
            )

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened, stacked parameter."""
        pieces, offset = [], 0
        for name in self.names:
            size = math.prod(self.checkpoint.shape(name))
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                pieces.append(self.checkpoint.read(name, low, high))
            offset += size
        return torch.cat(pieces) if pieces else torch.empty(0)


class Weights:
    """Where each parameter of a `Stack` comes from: a model's checkpoint, a run's, or a seeded start.

    `starts` takes the place of seeded ones: what is put there before the stack is filled is what training starts from.

    Args:
        start, teacher: Checkpoints of runs: for what is trained, and for the teacher's adapters and the copied head.
    """

    def __init__(
        self,
        stack: Stack,
        encoder: Checkpoint,
        decoder: Checkpoint,
        *,
        seed: int,
        projection_init: str,
        start: Checkpoint | None = None,
        teacher: Checkpoint | None = None,
    ) -> None:
        self.seed, self.projection_init = seed, projection_init
        self.starts: dict[str, torch.Tensor] = {}
        self.shapes = {name: parameter.shape for name, parameter in stack.named_parameters()}
        self.sources = _encoder_sources(encoder, len(stack.encoder.layers)) if stack.reads_stack else {}
        self.sources |= _decoder_sources(decoder, len(stack.decoder.layers))
        if start:
            made = [name for name in self.shapes if name not in self.sources and ".teacher." not in name]
            self.sources |= _run_sources(start, [name for name in made if name != HEAD or has_head(start)])
        if teacher:
            self.sources |= _run_sources(teacher, [name for name in self.shapes if name == HEAD or ".teacher." in name])
        for name, shape in self.shapes.items():
            if name in self.sources:
                self.sources[name].check(name, shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter `name`; the caller casts."""
        if name in self.sources:
            return self.sources[name].read(start, stop)
        return self._start(name).reshape(-1)[start:stop]

    def _start(self, name: str) -> torch.Tensor:
        """The value that training starts from, drawn from (seed, name) alone: the same on any number of ranks."""
        if name in self.starts:
            return self.starts[name]
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        shape = self.shapes[name]
        if ".student." in name:
            return initial_adapter(name, shape, generator)
        if name == HEAD:
            bound = 1.0 / math.sqrt(shape[1])  # nn.Linear's
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        bound = 1.0 / math.sqrt(self.shapes["projection.weight"][1])  # nn.Linear's start
        if self.projection_init != "linear":  # "least_squares" too, where nobody has solved for it
            bound = 0.0 if name == "projection.bias" else bound * self._embedding_scale()
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def _embedding_scale(self) -> float:
        """What makes the first student states as large (root mean square) as the LLM's embeddings.

        The LLM adds its layers' updates to them: states many times larger would hardly be changed by any layer.
        """
        size, width = math.prod(self.shapes["decoder.embedding.weight"]), self.shapes["projection.weight"][1]
        start = max(0, (size - EMBEDDING_SAMPLE) // 2)
        embedding_rms = _rms(self.read("decoder.embedding.weight", start, min(start + EMBEDDING_SAMPLE, size)))
        norm = [self.read(f"projection.norm_{part}", 0, width) for part in ("weight", "bias")]
        normed_rms = math.hypot(*map(_rms, norm))  # of the encoder's states after its last LayerNorm
        return math.sqrt(3) * embedding_rms / normed_rms  # a uniform variable's bound is sqrt(3) times its rms


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def build_stack(config: Config) -> tuple[Stack, Weights]:
    """The stack on the meta device, and what fills it (see `engine.shard`).

    Raises:
        ValueError: A checkpoint is missing, of another architecture, or does not fit its configuration.
    """
    encoder_folder, decoder_folder = resolve(config.model.encoder), resolve(config.model.decoder)
    encoder_config = _load_config(encoder_folder, M2M100Config, "model.encoder")
    decoder_config = _load_config(decoder_folder, LlamaConfig, "model.decoder")
    _check_configs(config, encoder_config, decoder_config)
    start, teacher = (
        run_checkpoint(folder) if folder else None for folder in (config.model.start, config.model.teacher)
    )
    if start:
        _check_adapters(config, start)
    with torch.device("meta"):
        stack = Stack(config, encoder_config, decoder_config, _task_parts(config, start, teacher))
    weights = Weights(
        stack,
        Checkpoint(encoder_folder),
        Checkpoint(decoder_folder),
        seed=config.run.seed,
        projection_init=config.model.projection_init,
        start=start,
        teacher=teacher,
    )
    return stack, weights


def _check_adapters(config: Config, start: Checkpoint) -> None:
    """Raises: ValueError: The checkpoint's adapters are of another shape, or were applied with another factor."""
    if not (start.folder / "adapter_config.json").is_file():
        return
    saved = read_lora(start.folder)
    for key in ("rank", "alpha", "targets"):
        before, now = getattr(saved, key), getattr(config.lora, key)
        if set(before) != set(now) if key == "targets" else before != now:
            raise ValueError(f"lora.{key} is {now}, and {before} in model.start={start.folder}; set it to that")


def _task_parts(config: Config, start: Checkpoint | None, teacher: Checkpoint | None) -> TaskParts:
    """Raises: ValueError: As `find_task`, or the teacher's checkpoint is not of a fine-tuned LLM."""
    adapters = read_lora(teacher.folder) if teacher else None
    if not config.task.name or (config.objective.kind == "distil" and teacher is None):
        return TaskParts(teacher=adapters)
    task = find_task(config)
    head_of = {"distil": teacher, "finetune": None, "evaluate": start}[config.objective.kind]
    if head_of and not has_head(head_of):
        raise ValueError(f"{head_of.folder} has no head.safetensors; it takes a run of `mtllm finetune`")
    outputs = {"classification": len(task.labels), "choice": task.num_choices, "span": 2}[task.head]
    return TaskParts(outputs=outputs, head=task.head, teacher=adapters)


def find_task(config: Config) -> Task:
    """Raises: ValueError: The task is unknown, or none that can be distilled, where that is asked for."""
    task = load_task(config.task.name)
    if task.head == "span" and config.objective.kind == "distil":
        told = f"task {task.name} asks for a piece of the text, which no pooled state holds"
        raise ValueError(f'{told}: learn it directly, with objective.kind="finetune" and objective.reader="stack"')
    return task


def run_checkpoint(folder: str | Path) -> Checkpoint:
    """What a run trained, by the names of `saved_name`.

    Raises:
        ValueError: The folder is no checkpoint of a run.
    """
    folder = Path(folder).expanduser()
    files = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} is no checkpoint of a run: it has none of {', '.join(RUN_FILES)}")
    return Checkpoint(folder, files)


def read_lora(folder: Path) -> LoraConfig:
    """The adapters' shape, from PEFT's adapter_config.json.

    Raises:
        ValueError: There is none.
    """
    try:
        saved = json.loads((folder / "adapter_config.json").read_text())
        return LoraConfig(rank=saved["r"], alpha=saved["lora_alpha"], targets=tuple(saved["target_modules"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error


def has_head(checkpoint: Checkpoint) -> bool:
    return saved_name(HEAD) in checkpoint.names


def build_tokenizer(config: Config, stack: Stack) -> PairTokenizer:
    """Both tokenizers; they cut a text for those who read it: student and teacher, or `objective.reader` alone.

    Raises:
        ValueError: A tokenizer is missing or has more ids than its model has embeddings.
    """
    tokenizer = PairTokenizer(
        resolve(config.model.encoder),
        resolve(config.model.decoder),
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        reader=None if config.objective.kind == "distil" else config.objective.reader,
    )
    sides = [("model.decoder", tokenizer.largest_teacher_id, stack.decoder.embedding)]
    if stack.reads_stack:
        sides.append(("model.encoder", tokenizer.largest_student_id, stack.encoder.embedding))
    for key, largest, embedding in sides:
        if largest >= embedding.num_embeddings:
            raise ValueError(
                f"{key}: the tokenizer has ids up to {largest}, the model {embedding.num_embeddings} embeddings"
            )
    return tokenizer


def resolve(name: str) -> Path:
    """A folder as it is, or a hub id's snapshot, downloaded if need be.

    Raises:
        ValueError: Neither exists.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # only here is a network wanted

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the client raises a dozen unrelated types
        raise ValueError(f"{name} is neither a folder nor a model the hub gives ({type(error).__name__})") from error


def fingerprint(folder: Path) -> str:
    """A name for a checkpoint's content, its configuration and all its weights: reads every byte, on several cores."""
    digest = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:
        for sha256 in pool.map(sha256_of, _weight_files(folder)):
            digest.update(sha256.encode())
    return digest.hexdigest()


def saved_name(name: str) -> str:
    """A trained parameter's name in a run's checkpoint: PEFT's for adapters, plain ones for projection and head."""
    if ".student." not in name and ".teacher." not in name:
        return name.removeprefix("projection.").removeprefix("objective.")
    _, _, layer, fused, _, linear, matrix = name.split(".")
    original = next(item for item in LINEARS[fused] if item.endswith(linear))
    return f"base_model.model.layers.{layer}.{original}.{matrix}.weight"


def _run_sources(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Source]:
    return {name: Source(checkpoint=checkpoint, names=(saved_name(name),)) for name in names}


def _encoder_sources(checkpoint: Checkpoint, num_layers: int) -> dict[str, Source]:
    prefix = _prefix(checkpoint, ("model.encoder.", "encoder.", ""), "layers.0.self_attn.q_proj.weight")
    embedding = _first_of(checkpoint, (f"{prefix}embed_tokens.weight", "model.shared.weight", "shared.weight"))
    names = {
        "encoder.embedding.weight": [embedding],
        "projection.norm_weight": [f"{prefix}layer_norm.weight"],
        "projection.norm_bias": [f"{prefix}layer_norm.bias"],
    }
    parts = {
        "attention_norm": ["self_attn_layer_norm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "out": ["self_attn.out_proj"],
        "feed_forward_norm": ["final_layer_norm"],
        "up": ["fc1"],
        "down": ["fc2"],
    }
    for layer in range(num_layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                stacked = [f"{prefix}layers.{layer}.{name}.{kind}" for name in theirs]
                names[f"encoder.layers.{layer}.{ours}.{kind}"] = stacked
    return {name: Source(checkpoint=checkpoint, names=tuple(stacked)) for name, stacked in names.items()}


def _decoder_sources(checkpoint: Checkpoint, num_layers: int) -> dict[str, Source]:
    prefix = _prefix(checkpoint, ("model.", ""), "layers.0.self_attn.q_proj.weight")
    names = {
        "decoder.embedding.weight": [f"{prefix}embed_tokens.weight"],
        "objective.norm": [f"{prefix}norm.weight"],
    }
    for layer in range(num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"{prefix}layers.{layer}"
        names[f"{ours}.attention_norm"] = [f"{theirs}.input_layernorm.weight"]
        names[f"{ours}.mlp_norm"] = [f"{theirs}.post_attention_layernorm.weight"]
        for fused, linears in LINEARS.items():
            for kind in ("weight", "bias"):
                names[f"{ours}.{fused}.{kind}"] = [f"{theirs}.{linear}.{kind}" for linear in linears]
    return {name: Source(checkpoint=checkpoint, names=tuple(stacked)) for name, stacked in names.items()}


def _prefix(checkpoint: Checkpoint, candidates: Sequence[str], name: str) -> str:
    known = set(checkpoint.names)
    for prefix in candidates:
        if prefix + name in known:
            return prefix
    raise ValueError(f"{checkpoint.folder} has no tensor {candidates[0]}{name}")


def _first_of(checkpoint: Checkpoint, candidates: Sequence[str]) -> str:
    known = set(checkpoint.names)
    for name in candidates:
        if name in known:
            return name
    raise ValueError(f"{checkpoint.folder} has no tensor {candidates[0]}")


def _load_config(folder: Path, kind: type[PreTrainedConfig], key: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, KeyError, huggingface_hub's own for a value of the wrong type
        raise ValueError(f"{key}: {folder} has no readable config.json: {' '.join(str(error).split())}") from error
    if not isinstance(config, kind):
        raise ValueError(f"{key}: {folder} is a {config.model_type} model; this takes {kind.model_type}")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{key}: {folder} is quantised; this takes float32, bfloat16 or float16 weights")
    return config


def _check_configs(config: Config, encoder: M2M100Config, decoder: LlamaConfig) -> None:
    if encoder.activation_function not in ACTIVATIONS:
        raise ValueError(f"model.encoder: activation {encoder.activation_function!r} is not supported")
    if encoder.d_model % encoder.encoder_attention_heads:
        raise ValueError(
            f"model.encoder: its width {encoder.d_model} is no multiple of its {encoder.encoder_attention_heads} heads"
        )
    if decoder.hidden_act != "silu":
        raise ValueError(f"model.decoder: activation {decoder.hidden_act!r} is not supported; Llama has silu")
    for key, positions in (
        ("encoder", encoder.max_position_embeddings),
        ("decoder", decoder.max_position_embeddings),
    ):
        if config.data.max_length > positions:
            raise ValueError(f"data.max_length={config.data.max_length} is above the {positions} of model.{key}")


def _weight_files(folder: Path) -> list[Path]:
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / index} cannot be read: {error}") from error
            files = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index} names")
            return files
        if (folder / single).is_file():
            return [folder / single]
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _tensor_names(path: Path) -> list[str]:
    return list(_open(path).keys())


def _open(path: Path):
    """The file's tensors by name, memory-mapped."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # each library has its own types for a cut or damaged file
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
