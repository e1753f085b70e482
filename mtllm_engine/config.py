"""One TOML file, frozen dataclasses, dotted overrides: `load("run.toml", ["optim.lr=1e-4"])`."""

import dataclasses
import datetime
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from mtllm_engine.data.languages import check_language, is_well_formed

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The two frozen models and the projection between them; folders or Hugging Face hub ids."""

    encoder: str
    decoder: str
    causal: bool = False  # False: LLM2Vec's bidirectional attention
    dtype: typing.Literal["bfloat16", "float32"] = "bfloat16"  # of the frozen base; what is trained stays fp32
    base: typing.Literal["full", "fp8", "nf4"] = "full"  # the LLM's linears: in dtype; fp8 for speed; nf4 for memory
    projection_bias: bool = True
    # Outputs as large as the LLM's embeddings; nn.Linear's start; fitted to the embeddings of aligned tokens.
    projection_init: typing.Literal["embedding", "linear", "least_squares"] = "embedding"
    attention: typing.Literal["auto", "torch", "flash_attn", "reference"] = "auto"
    start: str = ""  # a checkpoint that projection and adapters start from, as stage 2 starts from stage 1's
    teacher: str = ""  # a checkpoint of the fine-tuned LLM: its adapters make the teacher, its head is copied


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What learns what. `mtllm finetune` is for "finetune", `mtllm train` for "distil"."""

    # The teacher's states; the labels of `task`; nothing (`mtllm evaluate` and `targets` set that themselves).
    kind: typing.Literal["distil", "finetune", "evaluate"] = "distil"
    reader: typing.Literal["stack", "llm"] = "stack"  # what learns: encoder and LLM, or the LLM on its own tokens
    token_weight: float = 0.0  # w: (1 - w) pooled error + w error on aligned tokens


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task's files, each as DATASET:FOLDER; all but `test` are read in English."""

    name: str = ""  # a file of mtllm_engine/tasks; "": none
    train: str = ""
    validation: str = ""  # picks the best checkpoint
    test: tuple[str, ...] = ()  # read in every language that is there


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = LORA_TARGETS


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora (folders of shards) and how documents become packs; exactly one of the two pack sizes is above 0."""

    train: tuple[str, ...] = ()  # with `task.train`, whose files are packed into the run's folder: what stage 2 adds
    weights: tuple[float, ...] = ()  # of the corpora in the mixture, the task's first; empty: by number of documents
    validation: str = ""
    targets: str = ""  # name of stored teacher states beside the corpora (`mtllm targets`); "": the teacher runs
    lanes: int = 64
    pack_documents: int = 0  # exactly k documents a pack
    pack_tokens: int = 0  # as many whole documents as fit, on each side that is read
    max_length: int = 512  # tokens of one document, on each side that is read
    truncation: typing.Literal["aligned", "independent"] = "aligned"
    on_error: typing.Literal["raise", "skip"] = "raise"
    prefetch: int = 2  # steps read ahead


@dataclass(frozen=True, kw_only=True)
class LanguagesConfig:
    """`fallback`: for a language that the encoder has no token for, the one whose token it gets instead."""

    fallback: dict[str, str] = field(default_factory=dict)  # such as {nij_Latn = "ind_Latn"}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and linear decay to 0; exactly one of steps and epochs is above 0."""

    steps: int = 0
    epochs: float = 0.0  # of data.train, rounded up to whole steps; needs data.pack_documents
    lr: float = 2e-4
    warmup: float = 0.01  # share of the steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the whole gradient; 0: no clipping


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    max_tokens: int = 16384  # of a micro-batch, on each side
    # Of the student, for backward: "save" computes again only norms and SwiGLU's product; "selective" also the gate and
    # up projections (of Llama-3-8B's 92 KiB per token and layer 36 remain); "recompute" the whole layer (8 remain).
    activations: typing.Literal["save", "selective", "recompute"] = "save"


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    stage: typing.Literal[0, 3] = 3  # 0: plain PyTorch on one rank


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500  # steps; what validation finds best so far is saved besides
    keep: int = 3  # the newest, and the best one


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str
    seed: int = 0
    log_every: int = 10  # steps between two looks at the device
    validate_every: int = 500


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`mtllm evaluate`: the LLM of model.teacher, alone or after translation, and the stack of model.start."""

    systems: tuple[typing.Literal["llm", "translate_test", "stack"], ...] = ("llm", "translate_test", "stack")
    stack_name: str = "stack"  # what tables call it
    languages: tuple[str, ...] = ()  # of each test set those that it has; empty: all
    translator: str = ""  # an NLLB model, folder or hub id; "": model.encoder
    num_beams: int = 1
    results: str = ""  # a folder, which several seeds may share; "": `results` in run.dir
    translations: str = ""  # a folder, which any runs may share; "": `translations` in results


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Parallel lines that every validation reads: the student the foreign line, the teacher the English one."""

    folder: str = ""  # FLORES-200's: `dev/swh_Latn.dev`, or `dev/dev.swh_Latn`; "": no probe
    split: str = "dev"
    languages: tuple[str, ...] = ()  # empty: all that are there and the encoder knows
    lines: int = 0  # the first so many; 0: all


@dataclass(frozen=True, kw_only=True)
class Config:
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
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, typing.Any] = field(default_factory=dict)  # merged over the derived DeepSpeed configuration


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides.

    Raises:
        ValueError: A key or value is not valid; the message names the dotted key.
    """
    return from_dict(read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, typing.Any]:
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
    for override in overrides:
        _override(tree, override)
    return tree


def from_dict(tree: Mapping[str, typing.Any]) -> Config:
    """Builds and checks a configuration from nested dictionaries.

    Raises:
        ValueError: As `load`.
    """
    config = _build(Config, tree, "")
    _check(config)
    return config


def dumps(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to an equal value."""
    sections = dataclasses.asdict(config)
    lines = []
    for name, section in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def flatten(config: Config) -> dict[str, typing.Any]:
    """Dotted key -> value, for comparing two configurations."""
    return {
        f"{name}.{key}": value for name, section in dataclasses.asdict(config).items() for key, value in section.items()
    }


def _override(tree: dict, override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = parts = dotted.strip().split(".")
    if not equals or "" in parts:
        raise ValueError(f"not an override: {override!r}; write section.key=value, such as optim.lr=1e-4")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{dotted}: {section} is not a section")
    tree[key] = _parse(text.strip())


def _parse(text: str) -> typing.Any:
    """A TOML value; what is not one is a string, so that paths need no quotes in a shell."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, datetime.date | datetime.time) else value  # run.dir=2030-01-31 is a folder


def _build(cls: type, tree: typing.Any, prefix: str) -> typing.Any:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix} must be a section, not {tree!r}")
    known = {item.name: item for item in fields(cls)}
    for key in tree:
        if key not in known:
            raise ValueError(f"unknown key: {_join(prefix, key)}{_suggestion(key, prefix)}")
    missing = [name for name, item in known.items() if name not in tree and _is_required(item)]
    if missing:
        raise ValueError(f"missing key: {', '.join(_join(prefix, name) for name in missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(value, hints[key], _join(prefix, key)) for key, value in tree.items()})


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _suggestion(key: str, prefix: str) -> str:
    """The nearest known dotted key: the same name anywhere, else a like one here, else a like one anywhere."""
    dotted_keys = list(_dotted_keys(Config))
    by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(dotted_keys)}  # the first of a name
    here = {name: dotted for dotted in dotted_keys for place, _, name in [dotted.rpartition(".")] if place == prefix}
    for candidates, cutoff in ((by_name, 1.0), (here, 0.6), (by_name, 0.6)):
        near = difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)
        if near:
            return f"; did you mean {candidates[near[0]]}?"
    return ""


def _dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        dotted = _join(prefix, item.name)
        yield dotted
        if is_dataclass(hints[item.name]):
            yield from _dotted_keys(hints[item.name], dotted)


def _convert(value: typing.Any, hint: typing.Any, dotted: str) -> typing.Any:
    """Checks a TOML value against a type hint; a whole number is also a float, one string also a tuple of one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _build(hint, value, dotted)
    if origin is typing.Literal:
        if value not in arguments or type(value) is not type(arguments[0]):
            raise ValueError(f"{dotted} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
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


def _convert_tuple(value: typing.Any, arguments: tuple, dotted: str) -> tuple:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{dotted} must be a list, not {value!r}")
    item_hints = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
    if len(items) != len(item_hints):
        raise ValueError(f"{dotted} must have {len(item_hints)} values, not {len(items)}")
    return tuple(_convert(item, hint, f"{dotted}[{i}]") for i, (item, hint) in enumerate(zip(items, item_hints)))


def _describe(cls: type) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a table"}[cls]


def _check(config: Config) -> None:
    """What no type says: ranges, and keys that depend on one another."""
    data, optim, lora, memory = config.data, config.optim, config.lora, config.memory
    rules = [
        *_task_rules(config),
        (
            len(data.weights) in (0, len(data.train) + bool(config.task.train)),
            "data.weights must have one weight per data.train, after one for task.train if there is one",
        ),
        (all(weight > 0 for weight in data.weights), "data.weights must be above 0"),
        (data.lanes >= 1, "data.lanes must be at least 1"),
        (data.max_length >= 4, "data.max_length must be at least 4 (special tokens and a word)"),
        (
            min(data.pack_documents, data.pack_tokens) == 0 < max(data.pack_documents, data.pack_tokens),
            "set one of data.pack_documents and data.pack_tokens above 0 and the other to 0",
        ),
        (data.prefetch >= 1, "data.prefetch must be at least 1"),
        (optim.steps >= 0 and optim.epochs >= 0, "optim.steps and optim.epochs must be 0 or above"),
        (
            min(optim.steps, optim.epochs) == 0 and (max(optim.steps, optim.epochs) > 0 or config.task.test),
            "optim.epochs or optim.steps must be above 0, and the other 0",
        ),
        (optim.steps or data.pack_documents, "optim.epochs needs data.pack_documents, which fixes a step's documents"),
        (optim.lr > 0, "optim.lr must be above 0"),
        (0 <= optim.warmup < 1, "optim.warmup is a share of the steps: 0 <= warmup < 1"),
        (all(0 <= beta < 1 for beta in optim.betas), "optim.betas must be in [0, 1)"),
        (optim.eps > 0, "optim.eps must be above 0"),
        (optim.weight_decay >= 0, "optim.weight_decay must be 0 or above"),
        (optim.clip >= 0, "optim.clip must be 0 (off) or above"),
        (lora.rank >= 1, "lora.rank must be at least 1"),
        (lora.alpha > 0, "lora.alpha must be above 0"),
        (0 <= lora.dropout < 1, "lora.dropout must be in [0, 1)"),
        (
            config.model.base == "full" or config.zero.stage == 0,
            f"model.base={config.model.base!r} is not sharded: set zero.stage=0 (one GPU), or model.base='full'",
        ),
        (config.checkpoint.every >= 1, "checkpoint.every must be at least 1"),
        (config.evaluate.systems, "evaluate.systems is empty"),
        (config.evaluate.num_beams >= 1, "evaluate.num_beams must be at least 1"),
        (config.checkpoint.keep >= 1, "checkpoint.keep must be at least 1"),
        (config.probe.split, "probe.split is empty; FLORES-200 has dev and devtest"),
        (config.probe.lines >= 0, "probe.lines must be 0 (all) or above"),
        (config.run.log_every >= 1, "run.log_every must be at least 1"),
        (config.run.validate_every >= 1, "run.validate_every must be at least 1"),
        (config.run.dir, "run.dir is empty"),
        (0 <= config.run.seed < 1 << 63, "run.seed must be 0 or above, and below 2^63"),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
    for target in lora.targets:
        if target not in LORA_TARGETS:
            raise ValueError(f"lora.targets: {target!r} is none of {', '.join(LORA_TARGETS)}")
    _check_fallback(config.languages.fallback)
    largest = data.pack_tokens or data.pack_documents * data.max_length
    if data.pack_tokens and data.pack_tokens < data.max_length:
        raise ValueError(f"data.pack_tokens={data.pack_tokens} cannot hold data.max_length={data.max_length} tokens")
    if largest > memory.max_tokens:
        raise ValueError(
            f"a pack may have {largest} tokens: raise memory.max_tokens={memory.max_tokens} or make packs smaller"
        )


def _task_rules(config: Config) -> list[tuple[object, str]]:
    """What the kinds of training ask for."""
    data, task, objective, model = config.data, config.task, config.objective, config.model
    finetunes = objective.kind == "finetune"
    return [
        (data.train or task.train or task.test, "data.train names no corpus"),
        (
            not (data.train and task.train and finetunes),
            "data.train has no labels to fine-tune on beside task.train; leave it empty, or set it for stage 2 alone",
        ),
        *(
            (task.name or not getattr(task, key), f"task.{key} needs task.name")
            for key in ("train", "validation", "test")
        ),
        (task.name or not finetunes, 'objective.kind = "finetune" needs task.name and task.train'),
        (
            objective.kind != "distil" or objective.reader == "stack",
            'objective.reader = "llm" is for objective.kind = "finetune"',
        ),
        (not (finetunes and model.teacher), 'model.teacher is for objective.kind = "distil"'),
        (not (finetunes and data.targets), 'data.targets is for objective.kind = "distil"'),
        (
            not config.probe.folder or not (finetunes or data.targets),
            'probe.folder needs a live teacher: objective.kind = "distil" without data.targets',
        ),
        (0 <= objective.token_weight <= 1, "objective.token_weight is a share: 0 <= token_weight <= 1"),
        (
            not objective.token_weight or not (finetunes or data.targets or task.train),
            "objective.token_weight needs a live teacher and documents that are pooled whole (stage 1)",
        ),
    ]


def _check_fallback(fallback: Mapping[str, typing.Any]) -> None:
    for code, target in fallback.items():
        if not is_well_formed(code):
            raise ValueError(f"languages.fallback: {code!r} is not a language code such as nij_Latn")
        if not isinstance(target, str):
            raise ValueError(f"languages.fallback.{code} must be a language code, not {target!r}")
        try:
            check_language(target)
        except ValueError as error:
            raise ValueError(f"languages.fallback.{code}: {error}") from None


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_value(key)


def _toml_value(value: typing.Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan too, which JSON spells otherwise
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # but for DEL, TOML's strings are JSON's
