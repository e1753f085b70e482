"""Which of the stack's parameters comes from which tensors.

Nothing here holds a model: `Weights.read(name, start, stop)` gives a flat slice of one of the
stack's parameters, cast after slicing, so that W ZeRO-3 ranks together read each file once.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mtllm_engine.model import peft
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.model.lora import initial_adapter
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.tensors import TensorFiles, Tensors, check_finite

RUN_FILES = ("adapter_model.safetensors", "projection.safetensors", "head.safetensors")
ADAPTERS, PROJECTION_FILE, HEAD_FILE = RUN_FILES
HEAD = "objective.head.weight"
PROJECTION = ("projection.weight", "projection.bias")
EMBEDDING = "decoder.embedding.weight"
EMBEDDING_SAMPLE = 1 << 24  # numbers of the LLM's embedding that stand for all of it
DECODER_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")
DECODER_PREFIXES += ("language_model.",)
PADDED_PREFIXES = ("", "roberta.", "bert.", "model.encoder.", "encoder.", "model.")
PADDED_PREFIXES += ("transformer.encoder.",)
LAYER = re.compile(r".*?\.\d+\.")  # such as `encoder.block.0.`
OLD_NORMS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parameter's origin: tensors of one checkpoint, stacked along the first dimension."""

    files: Tensors
    names: tuple[str, ...]
    offset: float = 0.0
    """What is added to every number, in fp32."""

    def check(self, parameter_name: str, shape: Sequence[int]) -> None:
        """Raises: ValueError: A tensor is missing or does not fit."""
        shapes = [self.files.shape(name) for name in self.names]
        stacked = (sum(item[0] for item in shapes), *shapes[0][1:])
        if stacked != tuple(shape):
            names = ", ".join(self.names)
            ours = f"the model's {parameter_name} {tuple(shape)}"
            raise ValueError(f"{self.files.folder}: {names} has shape {stacked}, {ours}")

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened, stacked parameter.

        Raises:
            ValueError: One of them is NaN or infinite.
        """
        pieces, offset = [], 0
        for name in self.names:
            size = math.prod(self.files.shape(name))
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                values = check_finite(self.files.read(name, low, high), self.files.folder, name)
                pieces.append(values.float() + self.offset if self.offset else values)
            offset += size
        return torch.cat(pieces) if pieces else torch.empty(0)


class Weights:
    """Where each parameter of a `Stack` comes from: a model's checkpoint, a run's, or a seeded
    start.

    `starts` takes the place of seeded ones: what is put there before the stack is filled is what
    training starts from.

    Args:
        start, teacher: Checkpoints of runs: for what is trained, and for the teacher's adapters and
            the copied head.
        frozen: The sum of adapters beside what is trained.
    """

    def __init__(
        self,
        stack: Stack,
        encoder: TensorFiles,
        decoder: Tensors,
        *,
        seed: int,
        projection_init: str,
        start: Tensors | None = None,
        frozen: Tensors | None = None,
        teacher: TensorFiles | None = None,
    ) -> None:
        self.seed, self.projection_init = seed, projection_init
        self.starts: dict[str, torch.Tensor] = {}
        self.shapes = {name: parameter.shape for name, parameter in stack.named_parameters()}
        self.embedding_scale = stack.decoder.embedding_scale
        self.sources = _decoder_sources(decoder, stack.decoder.spec)
        self.norms = ["projection.norm_weight", "projection.norm_bias"]
        if isinstance(stack.encoder, PaddedEncoder):
            self.norms = [f"encoder.{name}" for name in stack.encoder.norms]
            named = stack.encoder.named_parameters()
            self.shapes |= {f"encoder.{name}": parameter.shape for name, parameter in named}
            self.sources |= padded_sources(encoder, stack.encoder)
        elif stack.reads_stack:
            self.sources |= _encoder_sources(encoder, len(stack.encoder.layers))
        if start:
            rest = [name for name in self.shapes if name not in self.sources]
            trained = [name for name in rest if ".teacher." not in name and ".frozen_" not in name]
            begun = [name for name in trained if _is_begun(name, start)]
            _check_all_read(start, begun, left_out=() if stack.reads_stack else PROJECTION)
            self.sources |= _run_sources(start, begun)
        if frozen:
            kept = [name for name in self.shapes if ".frozen_" in name and _is_begun(name, frozen)]
            _check_all_read(frozen, kept, left_out=PROJECTION)
            self.sources |= _run_sources(frozen, kept)
        if teacher:
            copied = [name for name in self.shapes if name == HEAD or ".teacher." in name]
            _check_all_read(teacher, copied, left_out=PROJECTION)
            self.sources |= _run_sources(teacher, copied)
        for name, shape in self.shapes.items():
            if name in self.sources:
                self.sources[name].check(name, shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter `name`; the caller casts."""
        if name in self.sources:
            return self.sources[name].read(start, stop)
        return self._start(name).reshape(-1)[start:stop]

    def _start(self, name: str) -> torch.Tensor:
        """The value that training starts from, drawn from (seed, name) alone: the same on any
        number of ranks.
        """
        if name in self.starts:
            return self.starts[name]
        generator, shape = generator_of(self.seed, name), self.shapes[name]
        if ".frozen_" in name:  # beside the first of a sum: no other has adapters of this linear
            return torch.zeros(shape)
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

        The LLM adds its layers' updates to them: states many times larger would hardly be changed
        by any layer.
        """
        shapes = self.shapes
        size, width = math.prod(shapes[EMBEDDING]), shapes["projection.weight"][1]
        first = max(0, (size - EMBEDDING_SAMPLE) // 2)
        sample = self.read(EMBEDDING, first, min(first + EMBEDDING_SAMPLE, size))
        embedding_rms = _rms(sample) * self.embedding_scale
        # Of the encoder's states after its last norm.
        normed_rms = math.hypot(*(_rms(self.read(name, 0, width)) for name in self.norms))
        # A uniform variable's bound is sqrt(3) times its root mean square.
        return math.sqrt(3) * embedding_rms / normed_rms


def generator_of(seed: int, name: str) -> torch.Generator:
    """What a parameter's start is drawn from: the same on any number of ranks."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def checkpoint_tensors(folder: str | Path) -> TensorFiles:
    """What a run trained, by the names of `saved_name`.

    Raises:
        ValueError: The folder is no checkpoint of a run.
    """
    folder = Path(folder)
    files = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    if not files:
        names = ", ".join(RUN_FILES)
        raise ValueError(f"{folder} is no checkpoint of a run: it has none of {names}")
    return TensorFiles(folder, files, _adapter_name)


def _adapter_name(name: str) -> str:
    """PEFT's name on the LLM itself of a tensor that was saved on a model around it, such as
    LlamaForCausalLM; "" for that model's head."""
    if peft.head_of(name):
        return ""
    own = "base_model.model."
    for prefix in DECODER_PREFIXES:
        if name.startswith(f"{own}{prefix}layers."):
            return own + name.removeprefix(own + prefix)
    return name


def has_head(files: Tensors) -> bool:
    return saved_name(HEAD) in files.names


def has_projection(files: Tensors) -> bool:
    return any(saved_name(name) in files.names for name in PROJECTION)


def saved_name(name: str) -> str:
    """A trained parameter's name in a run's checkpoint: PEFT's for adapters, plain ones for
    projection and head.
    """
    if ".student." not in name and ".teacher." not in name:
        return name.removeprefix("projection.").removeprefix("objective.")
    _, _, layer, fused, _, linear, matrix = name.split(".")
    half = "self_attn" if fused in ("qkv", "out") else "mlp"
    matrix = matrix.replace("frozen_", "lora_")  # which is of another checkpoint
    return f"base_model.model.layers.{layer}.{half}.{linear}.{matrix}.weight"


def file_of(saved: str) -> str:
    """Where a run keeps a tensor of such a name."""
    if saved.startswith("base_model."):
        return ADAPTERS
    return HEAD_FILE if saved.startswith("head.") else PROJECTION_FILE


def _is_begun(name: str, start: Tensors) -> bool:
    """Whether a parameter of what is trained comes from a checkpoint, or is drawn."""
    if name == HEAD:
        return has_head(start)
    if name in PROJECTION:
        return has_projection(start)
    return ".student." not in name or start.adapts(name.split(".")[-2])


def _check_all_read(files: Tensors, names: Sequence[str], left_out: Sequence[str]) -> None:
    """Args: left_out: parameters that may be there too, besides a head, because who reads has no
    such part.

    Raises:
        ValueError: A run's checkpoint, or PEFT's adapters, have a tensor that nothing asks for.
    """
    known = {saved_name(name) for name in (*names, *left_out, HEAD)}
    for name in files.names:
        path = files.path(name)
        if name not in known or path.name != file_of(name):
            is_bias = path.name == PROJECTION_FILE and name == "bias"
            fix = "set model.projection_bias=true" if is_bias else "it is not for this model"
            raise ValueError(f"{path}: nothing reads its tensor {name}; {fix}")


def _run_sources(files: Tensors, names: Sequence[str]) -> dict[str, Source]:
    return _sources(files, {name: [saved_name(name)] for name in names})


def _encoder_sources(files: TensorFiles, num_layers: int) -> dict[str, Source]:
    prefix = _prefix(files, ("model.encoder.", "encoder.", ""), "layers.0.self_attn.q_proj.weight")
    embeddings = (f"{prefix}embed_tokens.weight", "model.shared.weight", "shared.weight")
    names = {
        "encoder.embedding.weight": [_first_of(files, embeddings)],
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
    for layer, (ours, theirs), kind in itertools.product(
        range(num_layers), parts.items(), ("weight", "bias")
    ):
        stacked = [f"{prefix}layers.{layer}.{name}.{kind}" for name in theirs]
        names[f"encoder.layers.{layer}.{ours}.{kind}"] = stacked
    return _sources(files, names)


def padded_sources(files: TensorFiles, encoder: PaddedEncoder) -> dict[str, Source]:
    """Of an encoder that transformers' class runs, by our names: `encoder.` before the class' own.

    Raises:
        ValueError: A tensor is missing, or a layer has one that the class does not know.
    """
    ours = [name for name, _ in encoder.named_parameters()]
    prefix = _prefix(files, PADDED_PREFIXES, next(name for name in ours if LAYER.match(name)))
    names = {}
    for name in ours:
        candidates = [prefix + name]
        if name == encoder.family.embedding:
            candidates += encoder.family.shared
        for new, old in OLD_NORMS.items():
            candidates += [prefix + name.replace(new, old)] * name.endswith(new)
        names[f"encoder.{name}"] = [_first_of(files, candidates)]
    read = {name for (name,) in names.values()}
    layers = {match[0] for match in map(LAYER.match, read) if match}
    for name in files.names:
        match = LAYER.match(name)
        if match and match[0] in layers and name not in read:
            reason = f"{encoder.family.model} has no such part"
            raise ValueError(f"{files.path(name)}: nothing reads its tensor {name}; {reason}")
    return _sources(files, names)


def _decoder_sources(files: Tensors, spec: DecoderSpec) -> dict[str, Source]:
    first = f"layers.0.{spec.linears['down'][0]}.weight"
    prefix = _prefix(files, DECODER_PREFIXES, first)
    names = {EMBEDDING: [f"{prefix}embed_tokens.weight"]}
    norms = {"objective.norm": [f"{prefix}norm.weight"]}
    for layer in range(spec.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"{prefix}layers.{layer}"
        for name, norm in spec.norms.items():
            norms[f"{ours}.{name}"] = [f"{theirs}.{norm}.weight"]
        for fused, linears in spec.linears.items():
            for kind in ("weight", *["bias"] * (fused in spec.biases)):
                names[f"{ours}.{fused}.{kind}"] = [
                    f"{theirs}.{linear}.{kind}" for linear in linears
                ]
    return _sources(files, names) | _sources(files, norms, spec.norm_offset)


def _sources(
    files: Tensors, names: Mapping[str, Sequence[str]], offset: float = 0.0
) -> dict[str, Source]:
    """Args: names: of a parameter -> of the tensors that are stacked in it."""
    return {
        name: Source(files=files, names=tuple(stacked), offset=offset)
        for name, stacked in names.items()
    }


def _prefix(files: Tensors, candidates: Sequence[str], name: str) -> str:
    return _first_of(files, [prefix + name for prefix in candidates]).removesuffix(name)


def _first_of(files: Tensors, candidates: Sequence[str]) -> str:
    known = set(files.names)
    for name in candidates:
        if name in known:
            return name
    raise ValueError(f"{files.folder} has no tensor {candidates[0]}")
