"""One TOML file, frozen dataclasses, dotted overrides: `load("run.toml", ["optim.lr=1e-4"])`."""

import dataclasses
import datetime
import difflib
import itertools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from mtllm_engine.files import expand, is_name
from mtllm_engine.languages import check_code, is_well_formed

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a layer of Llama, and of most LLMs."""
LINEARS = (*LORA_TARGETS, "qkv_proj", "gate_up_proj")
"""Those of any LLM, by PEFT's names."""

FOLLOWING = {"rank": 0, "alpha": 0.0, "target_modules": ()}
"""[lora] as the adapters that are added up have it."""

PathText = Annotated[str, expand]
"""A path, a hub id or DATASET:FOLDER; `~` is the user's home."""

TAKEN = (
    "llm",
    "translate_test",
    "encoder",
    "sum",
    "dataset",
    "measure",
    "language",
    "languages",
    "status",
    "given",
)
"""Of the other systems and of the columns of results.csv."""

RENAMED = {
    "model.base": 'model.quantization, where "full" is "none"',
    "model.start": "model.init_from",
    "lora.targets": "lora.target_modules",
    "optim.warmup": "optim.warmup_ratio",
    "memory.activations": 'memory.recompute = "cheap" (was "save"), "mlp" (was "selective") or '
    '"layer" (was "recompute")',
    "data.weights": "data.mixture",
    "data.targets": "data.teacher_states",
    "data.validation": "validation.corpus",
    "run.validate_every": "validation.every",
    "distil": "stage2",
}
"""Keys of earlier versions, and what they are now."""

USUAL = {
    "learning_rate": "optim.lr",
    "num_epochs": "optim.epochs",
    "num_train_epochs": "optim.epochs",
    "max_epochs": "optim.epochs",
    "max_steps": "optim.steps",
    "num_steps": "optim.steps",
    "warmup_steps": "optim.warmup_ratio, a share of the steps",
    "max_grad_norm": "optim.clip",
    "batch_size": "data.pack_documents times data.lanes",
    "per_device_train_batch_size": "data.pack_documents times data.lanes",
    "gradient_accumulation_steps": "data.lanes: a step takes a pack from each, in as many "
    "micro-batches as memory.max_tokens asks for",
    "max_seq_length": "data.max_length",
    "train_file": "data.train",
    "output_dir": "run.dir",
    "logging_steps": "run.log_every",
    "eval_steps": "validation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "gradient_checkpointing": "memory.recompute",
    "model_name_or_path": "model.decoder",
    "load_in_4bit": 'model.quantization = "nf4"',
    "bf16": 'model.dtype = "bfloat16"',
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}
"""Other programs' words for keys, in whatever section, and what they are here."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The two frozen models and the projection between them."""

    encoder: PathText
    """The multilingual encoder, always frozen (NLLB, M2M-100, XLM-R, E5, mT5, ...): a folder or a
    hub id."""
    decoder: PathText
    """The LLM, whose own weights stay frozen (Llama, Mistral, Qwen, Gemma, ...): a folder or a
    hub id."""
    encoder_prefix: str = ""
    """Put before every text, or part of a text, that the encoder reads; E5 wants "passage: "."""
    adapters: tuple[PathText, ...] = ()
    """PEFT's adapters (folders or hub ids) that are merged into the LLM while it is read, in this
    order. Student and teacher both stand on the LLM that comes out."""
    causal: bool = False
    """Whether a token of the LLM sees only the tokens before it; false: all tokens, as LLM2Vec."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the frozen weights; what is trained is always float32."""
    quantization: Literal["none", "fp8", "nf4"] = "none"
    """How the LLM's linears are stored: in `dtype`, or in fp8 (faster), or in nf4 (smaller)."""
    projection_bias: bool = True
    """Whether the projection, the linear from the encoder's width to the LLM's, has a bias."""
    projection_init: Literal["embedding", "linear", "least_squares"] = "embedding"
    """Start of the projection: random, with outputs as large as the LLM's embeddings; random as
    `nn.Linear`; or fitted to the LLM's embeddings of aligned tokens."""
    attention: Literal["auto", "torch", "cudnn", "flash_attn", "flash_attn_4", "reference"] = "auto"
    """Which implementation of attention is used; the run's header names the one that runs. "auto"
    takes the one that was measured to be the fastest on this GPU, else FlashAttention 2."""
    lora_update: Literal["linear", "swiglu"] = "linear"
    """Where what the adapters of gate and up add is added: by their linear; or, on a GPU, inside
    SwiGLU, which saves a pass over a layer's widest tensor (not measured yet)."""
    init_from: tuple[PathText, ...] = ()
    """Checkpoints or PEFT's adapters that training starts from. The adapters of several are added
    up; projection and head come from the one that has them."""
    teacher: PathText = ""
    """A checkpoint of the fine-tuned LLM: the LLM with its adapters is the teacher, and its head is
    copied. Empty: the LLM as it is."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is trained, and on what."""

    kind: Literal["distil", "finetune"] = "distil"
    """Learn the teacher's states, or the labels of `task`; `mtllm finetune` sets "finetune"."""
    reader: Literal["stack", "llm"] = "stack"
    """What is trained: the stack (encoder, projection and LLM), or the LLM on its own tokens.
    `mtllm finetune` trains the LLM unless this says "stack"; distillation is for the stack."""
    token_weight: float = 0.0
    """Weight w in the loss: (1 - w) x error of the pooled states + w x error of aligned tokens."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task's files, written DATASET:FOLDER. Training and validation are read in English alone."""

    name: str = ""
    """The task's name, which is a file's in mtllm_engine/tasks; empty: no task."""
    train: PathText = ""
    """The training set; it is packed into the run's folder."""
    validation: PathText = ""
    """The validation set, whose score picks the best checkpoint."""
    test: tuple[PathText, ...] = ()
    """The test sets, each read in every language that it has."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The LoRA adapters, in every layer of the LLM."""

    rank: int = 16
    """Rank of every adapter. 0, or left out where `model.init_from` names several: the sum of
    their ranks."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by alpha / rank. 0, or left out where `model.init_from`
    names several: the first one's."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, as PEFT's `use_rslora`."""
    dropout: float = 0.05
    """Share of an adapter's inputs that is set to 0 in training."""
    target_modules: tuple[str, ...] = LORA_TARGETS
    """The linears that have an adapter, by PEFT's names. All seven of Llama's mean all linears of
    any LLM. Empty, or left out where `model.init_from` names several: each that one of them has."""
    train: Literal["all", "first"] = "all"
    """Where `model.init_from` names several: train all, or the first and freeze the others."""

    @property
    def scale(self) -> float:
        """What an adapter adds is multiplied by it."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, which are folders of shards, and how their documents are put into packs. Exactly one
    of `pack_documents` and `pack_tokens` is above 0."""

    train: tuple[PathText, ...] = ()
    """The corpora; beside `task.train`, the texts that stage 2 reads besides the task's."""
    mixture: tuple[float, ...] = ()
    """Weights of the corpora, with the task's first; empty: their numbers of documents."""
    teacher_states: str = ""
    """Name of the teacher's states that `mtllm targets` stored beside the corpora; empty: the
    teacher runs in every step."""
    lanes: int = 64
    """The corpus is read at so many places at once, and a step takes a pack from each. At least
    the number of GPUs, better a multiple of it."""
    pack_documents: int = 0
    """A pack has exactly so many documents."""
    pack_tokens: int = 0
    """A pack has as many whole documents as fit into so many tokens, counted for the encoder's
    tokenizer and for the LLM's."""
    max_length: int = 512
    """Tokens of the longest document, by either tokenizer; what is longer is cut."""
    truncation: Literal["aligned", "independent"] = "aligned"
    """A long document is cut at one character for both tokenizers, or after `max_length` tokens of
    each, which then read different text."""
    parts: Literal["whole", "lines", "sentences"] = "whole"
    """What the encoder reads at once: the text, a line or a sentence. Between lines the LLM reads
    its own tokens of the newlines there, between sentences nothing."""
    pairs: float = 0.0
    """For tasks of two texts: the share of the unlabelled documents that are replaced by two
    sentences on two lines, one of the document's own and one of another document."""
    on_error: Literal["raise", "skip"] = "raise"
    """A damaged shard or unusable document ends the run, or is left out and counted."""
    prefetch: int = 2
    """So many steps are read ahead."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation on held-out documents."""

    corpus: PathText = ""
    """A folder of shards; empty: `task.validation` if there is one, else no validation."""
    every: int = 500
    """Steps from one validation, and one reading of the probe, to the next. There is also one
    before the first step and one after the last."""


@dataclass(frozen=True, kw_only=True)
class LanguagesConfig:
    """Languages for which the encoder has no token."""

    fallback: dict[str, str] = field(default_factory=dict)
    """The language whose token such a language gets instead, as in {nij_Latn = "ind_Latn"}."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the learning rate rises linearly, then falls linearly to 0. Exactly one of `steps` and
    `epochs` is above 0."""

    steps: int = 0
    """Length of the training, in steps of the optimizer."""
    epochs: float = 0.0
    """Length of the training, in passes over its documents, rounded up to whole steps; needs
    `data.pack_documents`."""
    lr: float = 2e-4
    """The highest learning rate."""
    warmup_ratio: float = 0.01
    """Share of the steps in which the learning rate rises."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the whole gradient, to which a larger one is scaled; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a GPU (or CPU rank) holds at once."""

    max_tokens: int = 16384
    """Tokens of a micro-batch, which is what runs at once, by either tokenizer."""
    recompute: Literal["cheap", "mlp", "layer"] = "cheap"
    """What the backward pass computes again instead of keeping it: norms and SwiGLU's product; the
    gate and up projections too; or whole layers. Later ones need less memory and more time."""


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How weights are spread over GPUs."""

    stage: Literal["auto", 0, 3] = "auto"
    """0: whole on each GPU, in plain PyTorch; 3: a slice of everything on each GPU (DeepSpeed's
    ZeRO-3); "auto": 3 on CPUs, 0 on one GPU, else 0 where the estimate of memory fits and 3
    where it does not."""
    secondary: Literal["none", "node"] = "none"
    """With stage 3 on several nodes: "node" keeps all frozen weights on each node too, spread over
    its GPUs, so that after they were read none but small ones, such as norms, crosses the network
    (DeepSpeed's hpZ)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of what is trained."""

    every: int = 500
    """Steps from one checkpoint to the next; what validation finds best so far is saved besides."""
    keep: int = 3
    """So many of the newest are kept, and the best one."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run's folder and seed."""

    dir: PathText
    """The run's folder. A run continues from the checkpoint that it finds there."""
    seed: int = 0
    """Seed of the starting values, the order of documents and dropout."""
    log_every: int = 10
    """Steps from one look at the device, which makes it wait, to the next; then the bar and
    metrics.jsonl get all steps since the last."""
    max_bad_steps: int = 10
    """A step whose gradient is not finite makes no update; so many in a row end the run."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `mtllm evaluate` compares: the LLM of `model.teacher` on the foreign text ("llm") or on
    its English translation ("translate_test"), a linear head on the "encoder" alone, the stack of
    `model.init_from`, and the "sum" of stage 1's adapters and those of `model.teacher`."""

    systems: tuple[Literal["llm", "translate_test", "encoder", "sum", "stack"], ...] = (
        "llm",
        "translate_test",
        "stack",
    )
    """Which of them are evaluated. The encoder's head learns the English examples of `task.train`;
    those of `task.validation` say how strongly it is drawn to zero."""
    stage1: tuple[PathText, ...] = ()
    """Stage 1's checkpoint, which the sum needs."""
    stack_name: str = "stack"
    """What tables and folders call the stack: letters, digits and `_.+-`."""
    languages: tuple[str, ...] = ()
    """Languages to evaluate, by FLORES-200's codes or the test set's own ("sw"); empty: all that a
    test set has."""
    translator: PathText = ""
    """The NLLB model that translates, a folder or a hub id; empty: `model.encoder`."""
    num_beams: int = 1
    """Beams of the translator's search; 1: greedy."""
    translate_by: Literal["sentences", "lines"] = "sentences"
    """What the translator reads at a time; of a long line it leaves out what comes later."""
    results: PathText = ""
    """The folder of predictions and tables, which several seeds may share; empty: `results` in
    `run.dir`."""
    translations: PathText = ""
    """The folder of translations, which any runs may share; empty: `translations` in `results`."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Stage 1 in other languages: at every validation the student reads foreign lines and the
    teacher the English lines that mean the same."""

    folder: PathText = ""
    """A folder in the layout of FLORES-200, `dev/swh_Latn.dev` or `dev/dev.swh_Latn`; empty: no
    probe."""
    split: str = "dev"
    """FLORES-200's split, "dev" or "devtest"."""
    languages: tuple[str, ...] = ()
    """Languages to read; empty: all that are there and that the encoder knows."""
    lines: int = 0
    """So many lines of each language are read, from the first; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's whole configuration; each section is one of the classes above."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    task: TaskConfig = TaskConfig()
    lora: LoraConfig = LoraConfig()
    languages: LanguagesConfig = LanguagesConfig()
    memory: MemoryConfig = MemoryConfig()
    zero: ZeroConfig = ZeroConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """For experts: merged over the DeepSpeed configuration that follows from the other sections."""


def load(path: str | Path, overrides: Sequence[str] = (), *, finetunes: bool = False) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides.

    Args:
        finetunes: `objective.kind` is "finetune", and the LLM reads unless `objective.reader` says
            otherwise.

    Raises:
        ValueError: A key or value is not valid; the message names the dotted key.
    """
    tree = read(path, overrides)
    objective = tree.get("objective", {})
    if finetunes and isinstance(objective, Mapping):
        tree["objective"] = {"reader": "llm", **objective, "kind": "finetune"}
    return from_dict(tree)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A TOML file's tables with overrides applied, not yet checked.

    Raises:
        ValueError: There is no such file, or it or an override is not valid TOML.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for item in overrides:
        override(tree, item)
    return tree


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Builds and checks a configuration from nested dictionaries.

    Raises:
        ValueError: As `load`.
    """
    examined = examine(tree)
    if examined.problems:
        raise ValueError(examined.problems[0])
    return examined.config


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A configuration and everything that its keys and values have wrong, each fault once: what
    only follows from another is not named."""

    config: Config
    """With defaults, or "" where there is none, in the place of what cannot be read."""
    problems: tuple[str, ...]
    doubtful: frozenset[str]
    """Sections, and dotted keys, that a problem is about: what they say counts for nothing."""

    def knows(self, *keys: str) -> bool:
        """Whether none of some dotted keys is doubtful."""
        return not any(_is_doubtful(key, self.doubtful) for key in keys)


def examine(tree: Mapping[str, Any], doubtful: Collection[str] = ()) -> Examined:
    """Builds a configuration from nested dictionaries as far as they can be read.

    Args:
        doubtful: Sections and dotted keys that were found at fault before.
    """
    faults, tree = _Faults(), _with_sum(tree)
    # Wherever it stands, what a misspelled key was meant as is not missing.
    faults.doubtful |= {*doubtful} | {meant for key in _unknown_keys(tree) for meant in _meant(key)}
    config = _build(Config, tree, "", faults)
    _check(config, faults)
    problems, at_fault = tuple(faults.messages), frozenset(faults.doubtful)
    return Examined(config=config, problems=problems, doubtful=at_fault)


class _Faults:
    """What is wrong, in the order in which it was found, and which keys that is about."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.doubtful: set[str] = set()

    def add(self, message: str, *keys: str) -> None:
        self.messages.append(message)
        self.doubtful |= {*keys}


def _is_doubtful(dotted: str, doubtful: Collection[str]) -> bool:
    return dotted in doubtful or dotted.partition(".")[0] in doubtful


def _with_sum(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what [lora] leaves out of a sum left to its adapters."""
    model, lora = tree.get("model"), tree.get("lora", {})
    if not (isinstance(model, Mapping) and isinstance(lora, Mapping)):
        return tree
    origins = model.get("init_from")
    is_sum = isinstance(origins, list | tuple) and len(origins) > 1
    return {**tree, "lora": {**FOLLOWING, **lora}} if is_sum else tree


def dumps(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to an equal value."""
    sections = dataclasses.asdict(config)
    lines = []
    for name, section in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for comparing two configurations."""
    return {
        f"{name}.{key}": value
        for name, section in dataclasses.asdict(config).items()
        for key, value in section.items()
    }


def override(tree: dict[str, Any], item: str) -> None:
    """Sets what `section.key=value` says.

    Raises:
        ValueError: It is not of that form.
    """
    dotted, equals, text = item.partition("=")
    *sections, key = parts = dotted.strip().split(".")
    if not equals or "" in parts:
        raise ValueError(
            f"not an override: {item!r}; write section.key=value, such as optim.lr=1e-4"
        )
    if any(0xD800 <= ord(character) < 0xE000 for character in item):  # of a shell's odd bytes
        raise ValueError(f"not UTF-8, so no configuration can hold it: {item!r}")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{dotted}: {section} is not a section")
    tree[key] = _parse(text.strip())


def _parse(text: str) -> Any:
    """A TOML value; what is not one is a string, so that paths need no quotes in a shell."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_date = isinstance(value, datetime.date | datetime.time)
    return text if is_date else value  # run.dir=2030-01-31 is a folder


def _build(cls: type[Any], tree: Any, prefix: str, faults: _Faults) -> Any:
    """The section, or the whole, with a default in the place of each value that is at fault."""
    if not isinstance(tree, Mapping):
        faults.add(f"{prefix} must be a section, not {tree!r}", prefix)
        tree = {}
    known = {item.name: item for item in fields(cls)}
    for key in tree:
        if key not in known:
            faults.add(str(unknown_key(_join(prefix, key))))
    missing = [name for name, item in known.items() if name not in tree and _is_required(item)]
    missing = [_join(prefix, name) for name in missing]
    if missing := [key for key in missing if not _is_doubtful(key, faults.doubtful)]:
        faults.add(f"missing key: {', '.join(missing)}", *missing)
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, item in known.items():
        hint, dotted = hints[name], _join(prefix, name)
        if isinstance(hint, type) and is_dataclass(hint):
            if name in tree or _is_required(item):
                values[name] = _build(hint, tree.get(name, {}), dotted, faults)
        elif name in tree:
            try:
                values[name] = _convert(tree[name], hint, dotted)
            except ValueError as error:
                faults.add(str(error), dotted)
        if _is_required(item):  # those that are no sections are texts
            values.setdefault(name, "")
    return cls(**values)


def _unknown_keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """Sections, and dotted keys, that there are not."""
    known = set(_dotted_keys(Config))
    for name, section in tree.items():
        if name not in known:
            yield name
        elif isinstance(section, Mapping) and name != "deepspeed":
            yield from (f"{name}.{key}" for key in section if f"{name}.{key}" not in known)


def _meant(dotted: str) -> list[str]:
    """The key that an unknown one may have been meant as."""
    if dotted in RENAMED:
        return re.findall(r"^[\w.]+", RENAMED[dotted])
    if (name := dotted.rpartition(".")[2]) in USUAL:
        return re.findall(r"^[\w.]+", USUAL[name])
    return re.findall(r"[\w.]+", _suggestion(dotted).removeprefix("; did you mean "))


def unknown_key(dotted: str) -> ValueError:
    """The error that names what a key is called now, or the nearest known one."""
    if dotted in RENAMED:
        return ValueError(f"unknown key: {dotted}; it is {RENAMED[dotted]} now")
    if (name := dotted.rpartition(".")[2]) in USUAL:
        return ValueError(f"unknown key: {dotted}; here it is {USUAL[name]}")
    return ValueError(f"unknown key: {dotted}{_suggestion(dotted)}")


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _suggestion(dotted: str) -> str:
    """The nearest known key: the same name anywhere, else a like one here or, failing that,
    anywhere."""
    section, _, name = dotted.rpartition(".")
    known = [(key.rpartition(".")[2], key) for key in _dotted_keys(Config)]
    everywhere = dict(reversed(known))  # the first key of each name
    here = {last: key for last, key in known if key.rpartition(".")[0] == section}
    for candidates, cutoff in ((everywhere, 1.0), (here, 0.6), (everywhere, 0.6)):
        if near := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return f"; did you mean {candidates[near[0]]}?"
    return ""


def _dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        dotted = _join(prefix, item.name)
        yield dotted
        if is_dataclass(hints[item.name]):
            yield from _dotted_keys(hints[item.name], dotted)


def _convert(value: Any, hint: Any, dotted: str) -> Any:
    """Checks a TOML value against a type hint; a whole number is also a float, one string also a
    tuple of one, and "" an empty one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:  # a PathText
        return hint.__metadata__[0](_convert(value, arguments[0], dotted))
    if origin is Literal:
        if (type(value), value) not in [(type(each), each) for each in arguments]:
            raise ValueError(
                f"{dotted} must be one of {', '.join(map(repr, arguments))}, not {value!r}"
            )
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, dotted)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin if isinstance(hint, types.GenericAlias) else hint
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        raise ValueError(f"{dotted} must be {_describe(expected)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{dotted} must be finite, not {value!r}")
    return value


def _convert_tuple(value: Any, arguments: tuple, dotted: str) -> tuple:
    items = ([value] if value else []) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{dotted} must be a list, not {value!r}")
    item_hints = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
    if len(items) != len(item_hints):
        raise ValueError(f"{dotted} must have {len(item_hints)} values, not {len(items)}")
    pairs = enumerate(zip(items, item_hints))
    return tuple(_convert(item, hint, f"{dotted}[{i}]") for i, (item, hint) in pairs)


def _describe(cls: type) -> str:
    return {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        dict: "a table",
    }[cls]


class Rule(NamedTuple):
    """What must hold, and the error where it does not: it names the keys that it is about."""

    holds: object
    message: str
    also: tuple[str, ...] = ()
    """Keys that decide too, and that the message does not name."""
    spoils: tuple[str, ...] = ()
    """Keys that say nothing for sure where this does not hold; (): all that the message names."""

    @property
    def names(self) -> set[str]:
        return {".".join(pair) for pair in _DOTTED.findall(self.message)}


Rules = list[Rule]
_DOTTED = re.compile(rf"\b({'|'.join(item.name for item in fields(Config))})\.(\w+)")


def _check(config: Config, faults: _Faults) -> None:
    """What no type says: ranges, and keys that depend on one another."""
    # Each rule says what must hold and, where it does not, what to change. What is about a key that
    # has a fault already is not looked at: so rules that name a cause stand before those that name
    # its consequences.
    rules = (_task_rules, _data_rules, _optim_rules, _other_rules, _name_rules, _size_rules)
    for rule in itertools.chain.from_iterable(each(config) for each in rules):
        about = rule.names.union(rule.also)
        if not rule.holds and not any(_is_doubtful(key, faults.doubtful) for key in about):
            faults.add(rule.message, *(rule.spoils or rule.names))
    # What has a message of its own for every item.
    for key, messages in _item_problems(config).items():
        if not _is_doubtful(key, faults.doubtful):
            for message in messages:
                faults.add(message)


def _item_problems(config: Config) -> dict[str, list[str]]:
    """Key -> what is wrong with each of its items."""
    known, codes = ", ".join(LINEARS), config.evaluate.languages
    linears = [name for name in config.lora.target_modules if name not in LINEARS]
    return {
        "evaluate.languages": [
            f"evaluate.languages: {code!r} is no language code"
            for code in codes
            if not is_name(code)
        ],
        "lora.target_modules": [
            f"lora.target_modules: {name!r} is none of {known}" for name in linears
        ],
        "languages.fallback": _fallback_problems(config.languages.fallback),
    }


def _size_rules(config: Config) -> Rules:
    """A document fits a pack, and a pack a micro-batch."""
    data, memory = config.data, config.memory
    largest = data.pack_tokens or data.pack_documents * data.max_length
    sizes = f"data.pack_tokens={data.pack_tokens} cannot hold data.max_length={data.max_length}"
    fix = f"raise memory.max_tokens={memory.max_tokens} or make packs smaller"
    packs = ("data.pack_tokens", "data.pack_documents", "data.max_length")
    of_documents = f"data.pack_documents={data.pack_documents} x data.max_length={data.max_length}"
    pack = f"data.pack_tokens={data.pack_tokens}" if data.pack_tokens else of_documents
    too_large = f"{pack}: a pack may have {largest} tokens; {fix}"
    return [
        Rule(not data.pack_tokens or data.pack_tokens >= data.max_length, f"{sizes} tokens"),
        Rule(largest <= memory.max_tokens, too_large, packs, ("memory.max_tokens",)),
    ]


def _task_rules(config: Config) -> Rules:
    """What the kinds of training ask for."""
    data, task, objective, model = config.data, config.task, config.objective, config.model
    finetunes, kind = objective.kind == "finetune", ("objective.kind",)
    lives = not (finetunes or data.teacher_states)  # the teacher runs beside the student
    live = "a live teacher: distillation without data.teacher_states"
    corpora = ("task.train", "task.test")
    return [
        *(
            Rule(task.name or not getattr(task, key), f"task.{key} needs task.name")
            for key in ("train", "validation", "test")
        ),
        Rule(task.name or not finetunes, "fine-tuning needs task.name and task.train", kind),
        Rule(data.train or task.train or task.test, "data.train names no corpus", corpora),
        Rule(
            not (data.train and task.train and finetunes),
            "data.train has no labels to fine-tune on beside task.train; leave it empty, or set it "
            "for stage 2 alone",
            kind,
        ),
        Rule(
            finetunes or objective.reader == "stack",
            'objective.reader = "llm" is for fine-tuning',
            kind,
        ),
        Rule(not (finetunes and model.teacher), "model.teacher is for distillation", kind),
        Rule(
            not config.probe.folder or lives,
            "probe.folder is for distillation" if finetunes else f"probe.folder needs {live}",
            kind,
        ),
        Rule(
            not (finetunes and data.teacher_states),
            "data.teacher_states is for distillation",
            kind,
        ),
        Rule(
            0 <= objective.token_weight <= 1,
            "objective.token_weight is a share: 0 <= token_weight <= 1",
        ),
        Rule(
            not objective.token_weight or (lives and not task.train),
            "objective.token_weight needs a live teacher and documents that are pooled whole "
            "(stage 1)",
            (*kind, "data.teacher_states", "task.train"),
        ),
    ]


def _data_rules(config: Config) -> Rules:
    data = config.data
    num_corpora = len(data.train) + bool(config.task.train)
    pack_sizes = (data.pack_documents, data.pack_tokens)
    return [
        Rule(
            len(data.mixture) in (0, num_corpora),
            "data.mixture must have one weight per data.train, after one for task.train if there "
            "is one",
        ),
        Rule(all(weight > 0 for weight in data.mixture), "data.mixture must be above 0"),
        Rule(0 <= data.pairs <= 1, "data.pairs is a share: 0 <= pairs <= 1"),
        Rule(
            not data.pairs or not data.teacher_states,
            "data.pairs needs a live teacher: no states of pairs are stored; empty "
            "data.teacher_states",
        ),
        Rule(data.lanes >= 1, "data.lanes must be at least 1"),
        Rule(
            data.max_length >= 4, "data.max_length must be at least 4 (special tokens and a word)"
        ),
        Rule(
            min(pack_sizes) == 0 < max(pack_sizes),
            "set one of data.pack_documents and data.pack_tokens above 0 and the other to 0",
        ),
        Rule(data.prefetch >= 1, "data.prefetch must be at least 1"),
    ]


def _optim_rules(config: Config) -> Rules:
    optim = config.optim
    lengths = (optim.steps, optim.epochs)
    return [
        Rule(min(lengths) >= 0, "optim.steps and optim.epochs must be 0 or above"),
        Rule(
            min(lengths) == 0 and (max(lengths) > 0 or config.task.test),
            "optim.epochs or optim.steps must be above 0, and the other 0",
            ("task.test",),
        ),
        Rule(
            optim.steps or config.data.pack_documents,
            "optim.epochs needs data.pack_documents, which fixes a step's documents",
            ("optim.steps",),
        ),
        Rule(optim.lr > 0, "optim.lr must be above 0"),
        Rule(
            0 <= optim.warmup_ratio < 1,
            "optim.warmup_ratio is a share of the steps: 0 <= warmup_ratio < 1",
        ),
        Rule(all(0 <= beta < 1 for beta in optim.betas), "optim.betas must be in [0, 1)"),
        Rule(optim.eps > 0, "optim.eps must be above 0"),
        Rule(optim.weight_decay >= 0, "optim.weight_decay must be 0 or above"),
        Rule(optim.clip >= 0, "optim.clip must be 0 (off) or above"),
        *_lora_rules(config),
    ]


def _lora_rules(config: Config) -> Rules:
    lora, is_sum = config.lora, len(config.model.init_from) > 1
    origins = ("model.init_from",)
    several = "or 0 where several checkpoints are added up"
    return [
        Rule(lora.rank >= 1 - is_sum, f"lora.rank must be at least 1, {several}", origins),
        Rule(
            lora.alpha > 0 or (is_sum and not lora.alpha),
            f"lora.alpha must be above 0, {several}",
            origins,
        ),
        Rule(
            lora.train == "all" or is_sum,
            'lora.train = "first" is for a sum: model.init_from names several then',
        ),
        Rule(0 <= lora.dropout < 1, "lora.dropout must be in [0, 1)"),
    ]


def _other_rules(config: Config) -> Rules:
    zero = config.zero
    return [
        Rule(
            zero.secondary == "none" or zero.stage != 0,
            f"zero.secondary={zero.secondary!r} is for zero.stage=3: with 0 each GPU holds all "
            "weights; set zero.secondary='none'",
        ),
        Rule(config.validation.every >= 1, "validation.every must be at least 1"),
        Rule(config.checkpoint.every >= 1, "checkpoint.every must be at least 1"),
        Rule(config.checkpoint.keep >= 1, "checkpoint.keep must be at least 1"),
        Rule(config.evaluate.systems, "evaluate.systems is empty"),
        Rule(config.evaluate.num_beams >= 1, "evaluate.num_beams must be at least 1"),
        Rule(config.probe.split, "probe.split is empty; FLORES-200 has dev and devtest"),
        Rule(config.probe.lines >= 0, "probe.lines must be 0 (all) or above"),
        Rule(config.run.log_every >= 1, "run.log_every must be at least 1"),
        Rule(config.run.max_bad_steps >= 1, "run.max_bad_steps must be at least 1"),
        Rule(config.run.dir, "run.dir is empty"),
        Rule(0 <= config.run.seed < 1 << 63, "run.seed must be 0 or above, and below 2^63"),
    ]


def _name_rules(config: Config) -> Rules:
    """What becomes the name of a file or folder is one, before anything is read or removed."""
    states, stack = config.data.teacher_states, config.evaluate.stack_name
    form = "use letters, digits and _ . + -"
    return [
        Rule(not states or is_name(states), f"data.teacher_states: {states!r} is no name; {form}"),
        Rule(is_name(stack), f"evaluate.stack_name: {stack!r} is no name; {form}"),
        Rule(
            stack not in TAKEN,
            f"evaluate.stack_name: {stack!r} is the name of something else in the results; choose "
            "another",
        ),
        Rule(
            is_name(config.probe.split), f"probe.split: {config.probe.split!r} is no name; {form}"
        ),
    ]


def _fallback_problems(fallback: Mapping[str, Any]) -> list[str]:
    problems = []
    for code, target in fallback.items():
        if not is_well_formed(code):
            problems.append(f"languages.fallback: {code!r} is not a language code such as nij_Latn")
        if not isinstance(target, str):
            problems.append(f"languages.fallback.{code} must be a language code, not {target!r}")
            continue
        try:
            check_code(target)
        except ValueError as error:
            problems.append(f"languages.fallback.{code}: {error}")
    return problems


def _toml_key(key: str) -> str:
    return (
        key
        if key.replace("_", "").replace("-", "").isalnum() and key.isascii()
        else _toml_value(key)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan too, which JSON spells otherwise
    # But for DEL, TOML's strings are JSON's.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
