"""PEFT's adapter_config.json, read and written: what it says of adapters is applied, has no
influence, or is refused by name.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mtllm_engine.config import LINEARS, LoraConfig
from mtllm_engine.model.tensors import TensorFiles

FILE = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT reads the first that is there
AROUND = "base_model.model."
"""PEFT's own part of a tensor's name; behind it the model's that the adapters were made on."""
HEADS = ("classifier", "score")
"""Behind the LLM: PEFT saves them with adapters that were trained for a task."""
HEAD_TENSOR = re.compile(rf"{re.escape(AROUND)}({'|'.join(HEADS)})\.(weight|bias)")
PATTERNS = ("rank_pattern", "alpha_pattern")
APPLIED = ("r", "lora_alpha", "use_rslora", *PATTERNS, "target_modules")
CHOSEN = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Which of the linears that match have adapters: they need not be the same in every layer."""
WITHOUT_INFLUENCE = (  # on what adapters with given weights make of a text
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",  # how A was drawn
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",  # use_qalora has one
    "revision",
    "task_type",
)
OPENED_ON = {False: "on AutoModel with is_causal=False", True: "on AutoModel"}
"""What a checkpoint's target_modules say first, in a comment to Python: where its adapters belong,
by whether attention is causal. PEFT's error shows it where they are opened on another model."""
MERGED = ", after merging "
MERGE_FIRST = "merge them by PEFT's merge_and_unload and name that folder as model.decoder"
LAYERS = r"layers\.\d+\.(?:self_attn|mlp)\."
NEUTRAL: dict[str, tuple] = {  # values that ask for nothing, besides empty ones
    "peft_type": ("LORA",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    # Where A and B began; the others change the model's own weights too.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """An adapter_config.json that asks for nothing but what is applied."""

    path: Path
    keys: Mapping[str, Any]

    def rank_and_alpha(self, linear: str) -> tuple[int, float]:
        """Of one linear, by its name in the model that the adapters were made on.

        Raises:
            ValueError: They are no numbers, or a pattern is no expression.
        """
        rank = self._of(linear, "rank_pattern", self.keys["r"])
        alpha = self._of(linear, "alpha_pattern", self.keys["lora_alpha"])
        self.check("rank_pattern", type(rank) is int and rank >= 1, "whole numbers above 0")
        self.check("alpha_pattern", _is_number(alpha), "numbers")
        return rank, float(alpha)

    def scale(self, linear: str) -> float:
        """What the adapters of a linear add is multiplied by it. Raises: as `rank_and_alpha`."""
        rank, alpha = self.rank_and_alpha(linear)
        return LoraConfig(rank=rank, alpha=alpha, rslora=self.is_stabilised).scale

    @property
    def is_stabilised(self) -> bool:
        return self.keys.get("use_rslora") or False

    def targets(self, linear: str) -> bool:
        """Whether PEFT gives a linear adapters, or leaves those of the file unread.

        Raises:
            ValueError: What says so is no expression.
        """
        excluded, targets = self.keys.get("exclude_modules") or [], self.keys["target_modules"]
        if self._means("exclude_modules", excluded, linear):
            return False
        if isinstance(targets, str):
            is_all = targets.lower() == "all-linear"
            return is_all or self._means("target_modules", targets, linear)
        is_named = self._means("target_modules", targets, linear)
        return linear in targets or (is_named and self._is_in_layer(linear))

    def _is_in_layer(self, linear: str) -> bool:
        layers, patterns = (self.keys.get(key) for key in ("layers_to_transform", "layers_pattern"))
        if layers in (None, []):
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns or [r"[^.]*"]:
            place = rf"(?:|.*?\.){pattern}\.(?P<idx>\d+)\..*"
            if match := self._match("layers_pattern", place, linear):
                number = int(match["idx"])
                return number in (layers if isinstance(layers, list) else [layers])
        return False

    def _means(self, key: str, names: str | Sequence[str], linear: str) -> bool:
        """Whether an expression, or one of several ends of names, means a linear."""
        if isinstance(names, str):
            return bool(self._match(key, names, linear))
        return any(linear == name or linear.endswith(f".{name}") for name in names)

    def _of(self, linear: str, key: str, usual: Any) -> Any:
        """What the first pattern that means a linear says of it."""
        for pattern, value in (self.keys.get(key) or {}).items():
            if self._match(key, rf"(.*\.)?({pattern})", linear):
                return value
        return usual

    def _match(self, key: str, pattern: str, linear: str) -> re.Match | None:
        try:
            return re.fullmatch(pattern, linear)
        except re.error as error:
            raise ValueError(f"{self.path}: {key} has no expression: {error}") from None

    def check(self, key: str, fits: object, kind: str) -> None:
        """Raises: ValueError: What a key says is not of its kind."""
        if not fits:
            value = _short(self.keys[key])
            raise ValueError(f"{self.path}: {key}={value} is not implemented; give {kind}")


def read_saved(folder: Path, applied: Sequence[str] = APPLIED) -> Saved:
    """The keys of adapters.

    Args:
        applied: Those that who reads them applies.

    Raises:
        ValueError: There is no such file, or it asks for something else.
    """
    path = folder / FILE
    try:
        keys = json.loads(path.read_bytes())
        keys.items()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # What is not applied asks for nothing.
    for key, value in keys.items():
        if key not in (*applied, *WITHOUT_INFLUENCE) and not _is_neutral(key, value):
            reason = f"adapters are applied by {', '.join(applied)} alone"
            fix = f"train them without it, or {MERGE_FIRST}"
            raise ValueError(f"{path}: {key}={_short(value)} is not implemented; {reason}: {fix}")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in keys:
            raise ValueError(f"{path} has no {key}")
    saved = Saved(path=path, keys=keys)
    _check_kinds(saved)
    return saved


def _check_kinds(saved: Saved) -> None:
    """Raises: ValueError: What is applied is not of its kind."""
    keys, rank = saved.keys, saved.keys["r"]
    saved.check("r", type(rank) is int and rank >= 1, "a whole number above 0")
    saved.check("lora_alpha", _is_number(keys["lora_alpha"]), "a number")
    saved.check("use_rslora", type(saved.is_stabilised) is bool, "true or false")
    saved.check("target_modules", _are_names(keys["target_modules"]), "names of linears")
    # What may be empty.
    layers = keys.get("layers_to_transform")
    are_numbers = all(type(each) is int for each in (layers if type(layers) is list else [layers]))
    kinds = {key: (isinstance(keys.get(key), dict), "a table") for key in PATTERNS}
    kinds |= {key: (_are_names(keys.get(key)), "names") for key in CHOSEN}
    kinds |= {"layers_to_transform": (are_numbers, "numbers of layers")}
    for key, (fits, kind) in kinds.items():
        saved.check(key, fits or _is_neutral(key, keys.get(key)), kind)


def read_lora(folder: Path) -> LoraConfig:
    """The adapters' shape and factor, the same in every layer; of dropout, which has no influence,
    nothing.

    Raises:
        ValueError: There is no such file, or it asks for what is not implemented here.
    """
    saved = read_saved(folder)
    names = _listed(saved.keys["target_modules"])
    is_listed = isinstance(names, list) and set(names) <= set(LINEARS)
    saved.check("target_modules", is_listed, f"a list of {', '.join(LINEARS)}")
    rank, alpha = _same_everywhere(saved, folder)
    options = {"rslora": saved.is_stabilised, "target_modules": tuple(dict.fromkeys(names))}
    return LoraConfig(rank=rank, alpha=alpha, **options)


def _same_everywhere(saved: Saved, folder: Path) -> tuple[int, float]:
    """Rank and alpha of all linears; patterns that tell them apart are refused."""
    patterns = [key for key in PATTERNS if saved.keys.get(key)]
    linears = linears_of(adapter_tensors(folder)) if patterns else []
    sizes = {saved.rank_and_alpha(linear) for linear in linears} or {saved.rank_and_alpha("")}
    if len(sizes) > 1:
        ranks, _ = zip(*sizes)
        key = patterns[-1] if len(set(ranks)) == 1 else patterns[0]
        kind = "every linear the same, or name these adapters in model.adapters"
        saved.check(key, False, kind)
    return sizes.pop()


def adapter_tensors(folder: Path) -> TensorFiles:
    """The adapters of a folder, by PEFT's names.

    Raises:
        ValueError: There are none.
    """
    for name in TENSORS:
        if (folder / name).is_file():
            return TensorFiles(folder, [folder / name])
    raise ValueError(f"{folder} has no {TENSORS[0]}: it is no folder of PEFT's adapters")


def head_of(tensor: str) -> str:
    """The head that a tensor is of, by PEFT's name of it; "" for those of the LLM."""
    match = HEAD_TENSOR.fullmatch(tensor)
    return match[1] if match else ""


def read_heads(folder: Path) -> list[str]:
    """The heads that lie beside adapters, which are left out. Raises: as `adapter_tensors`."""
    return sorted(set(filter(None, map(head_of, adapter_tensors(folder).names))))


def linears_of(tensors: TensorFiles) -> list[str]:
    """The linears that have adapters, by their names in the model that these were made on."""
    ends = (".lora_A.weight", ".lora_B.weight")
    names = [name for name in tensors.names if name.startswith(AROUND) and name.endswith(ends)]
    return list(dict.fromkeys(name.removeprefix(AROUND)[: -len(ends[0])] for name in names))


def read_base(folder: Path) -> str:
    """The LLM that adapters say they stand on; "" where they do not."""
    return str(json.loads((folder / FILE).read_bytes()).get("base_model_name_or_path") or "")


def read_chain(folder: Path) -> tuple[str, ...]:
    """The adapters that were merged into the LLM before a checkpoint's were trained, in order, as
    it says itself; none of others' folders."""
    targets = json.loads((folder / FILE).read_bytes()).get("target_modules")
    said = _split_expression(targets)
    return said[0] if said else ()


def peft_config(
    lora: LoraConfig, base: str, *, causal: bool, chain: Sequence[str] = ()
) -> dict[str, Any]:
    """What `PeftModel.from_pretrained` needs to know of adapters.

    Their tensors are named as in LlamaModel. On LlamaForCausalLM PEFT would find none of them and
    give the bare LLM, with a warning: an expression that matches LlamaModel's names alone makes
    that an error.

    Args:
        base: The LLM's name.
        chain: Adapters that were merged into it first, in order.
    """
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": _expression(lora.target_modules, chain, causal=causal),
        "bias": "none",
        "inference_mode": True,
    }


def _expression(targets: Sequence[str], chain: Sequence[str], *, causal: bool) -> str:
    """The full names, within LlamaModel, of these linears of every layer."""
    # Quoted, no name has a bracket, which would end the comment, or a blank.
    merged = MERGED + " then ".join(map(quote, chain)) if chain else ""
    return f"(?#{OPENED_ON[causal]}{merged}){LAYERS}(?:{'|'.join(targets)})"


def _split_expression(text: Any) -> tuple[tuple[str, ...], list[str]] | None:
    """The chain and the linears of `_expression`; None of anything else."""
    if not isinstance(text, str):
        return None
    comment, _, rest = text.partition(")")
    quoted = comment.partition(MERGED)[2]
    chain = tuple(map(unquote, quoted.split(" then "))) if quoted else ()
    targets = rest.removesuffix(")").rpartition("(?:")[2].split("|")
    is_ours = any(text == _expression(targets, chain, causal=each) for each in OPENED_ON)
    return (chain, targets) if is_ours else None


def _listed(names: Any) -> Any:
    """The linears of `_expression`; whatever else target_modules may be, as it is."""
    said = _split_expression(names)
    return said[1] if said else names


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a key asks for nothing: 0 may be a layer's number."""
    if key == "modules_to_save" and isinstance(value, list):  # a head moves no state of the LLM
        value = [name for name in value if name not in HEADS]
    is_empty = value is None or value is False or value in ([], {}, "")
    return is_empty or value in NEUTRAL.get(key, ())


def _are_names(value: Any) -> bool:
    """Whether they are an expression, or a list of names."""
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and all(isinstance(each, str) and each for each in names or [0])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
