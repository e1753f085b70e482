"""PEFT's adapter_config.json, read and written: what it says of adapters is applied, has no
influence, or is refused by name.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtllm_engine.config import LORA_TARGETS, LoraConfig

FILE = "adapter_config.json"
APPLIED = ("r", "lora_alpha", "use_rslora", "target_modules")
WITHOUT_INFLUENCE = (  # on what adapters with given weights make of a text
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",  # use_qalora has one
    "revision",
    "task_type",
)
OPENED_ON = {False: "(?#on AutoModel with is_causal=False)", True: "(?#on AutoModel)"}
"""What a checkpoint's target_modules say first, a comment to Python: where its adapters belong, by
whether attention is causal. PEFT's error shows it where they are opened on another model."""
LAYERS = r"layers\.\d+\.(?:self_attn|mlp)\."
NEUTRAL: dict[str, tuple] = {  # values that ask for nothing, besides empty ones
    "peft_type": ("LORA",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # others change the model's own weights
}


def read_lora(folder: Path) -> LoraConfig:
    """The adapters' shape and factor; of dropout, which has no influence, nothing.

    Raises:
        ValueError: There is no such file, or it asks for what is not implemented here.
    """
    path = folder / FILE
    try:
        saved = json.loads(path.read_bytes())
        saved.items()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # What is not applied asks for nothing.
    for key, value in saved.items():
        if key not in (*APPLIED, *WITHOUT_INFLUENCE) and not _is_neutral(key, value):
            applied = f"adapters are applied by {', '.join(APPLIED)} alone"
            fix = "train them without it, or merge them into model.decoder"
            raise ValueError(f"{path}: {key}={_short(value)} is not implemented; {applied}: {fix}")
    # What is applied is of its kind.
    rank, alpha, names = (_value(saved, key, path) for key in ("r", "lora_alpha", "target_modules"))
    names = _listed(names)
    is_stabilised = saved.get("use_rslora") or False
    kinds = {
        "r": (type(rank) is int and rank >= 1, "a whole number above 0"),
        "lora_alpha": (type(alpha) in (int, float) and math.isfinite(alpha), "a number"),
        "use_rslora": (type(is_stabilised) is bool, "true or false"),
        "target_modules": (
            isinstance(names, list) and names and all(name in LORA_TARGETS for name in names),
            f"a list of {', '.join(LORA_TARGETS)}",
        ),
    }
    for key, (fits, kind) in kinds.items():
        if not fits:
            raise ValueError(f"{path}: {key}={_short(saved[key])} is not implemented; give {kind}")
    targets = tuple(dict.fromkeys(names))
    return LoraConfig(rank=rank, alpha=float(alpha), rslora=is_stabilised, target_modules=targets)


def read_base(folder: Path) -> str:
    """The LLM that adapters say they stand on; "" where they do not."""
    return json.loads((folder / FILE).read_bytes()).get("base_model_name_or_path") or ""


def peft_config(lora: LoraConfig, base: str, *, causal: bool) -> dict[str, Any]:
    """What `PeftModel.from_pretrained` needs to know of adapters.

    Their tensors are named as in LlamaModel. On LlamaForCausalLM PEFT would find none of them and
    give the bare LLM, with a warning: an expression that matches LlamaModel's names alone makes
    that an error.

    Args:
        base: The LLM's name.
    """
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": _expression(lora.target_modules, causal=causal),
        "bias": "none",
        "inference_mode": True,
    }


def _expression(targets: Sequence[str], *, causal: bool) -> str:
    """The full names, within LlamaModel, of these linears of every layer."""
    return f"{OPENED_ON[causal]}{LAYERS}(?:{'|'.join(targets)})"


def _listed(names: Any) -> Any:
    """The linears of `_expression`; whatever else target_modules may be, as it is."""
    if isinstance(names, str):
        targets = names.removesuffix(")").rpartition("(?:")[2].split("|")
        if any(names == _expression(targets, causal=causal) for causal in OPENED_ON):
            return targets
    return names


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a key asks for nothing: 0 may be a layer's number."""
    is_empty = value is None or value is False or value in ([], {}, "")
    return is_empty or value in NEUTRAL.get(key, ())


def _value(saved: dict[str, Any], key: str, path: Path) -> Any:
    if key not in saved:
        raise ValueError(f"{path} has no {key}")
    return saved[key]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
