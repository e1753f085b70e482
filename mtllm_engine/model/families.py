"""The LLMs that go in: what their families have in common, and what each does differently.

A family is a row of `FAMILIES`: what of its Hugging Face configuration means what here. The decoder
is built from a `DecoderSpec` alone. Of every field of a configuration it is decided whether it is
read or has no influence on states (`decided`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mtllm_engine.model.refusals import why_not
from mtllm_engine.model.tensors import check_model

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Of a gated MLP: transformers' name -> `swiglu`'s."""
LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
GEMMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
FUSED = LINEARS | {"qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
WRAPPERS = ("gemma3", "mistral3")
"""Models of text and images, of which the text's part is read."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One kind of rotary embedding."""

    frequencies: tuple[float, ...]
    """fp32 values, k of them: of a head's K channels the first 2k turn."""
    scale: float = 1.0
    """What cos and sin are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """All that the decoder's layers need to know of an LLM."""

    family: str
    """transformers' model_type."""
    vocab_size: int
    width: int
    inner_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    eps: float
    max_length: int
    """Tokens of the longest text that is read as the LLM reads it."""
    limit: str
    """What sets `max_length`."""
    ropes: tuple[Rope, ...]
    rope_of: tuple[int | None, ...]
    """Of each layer: which of `ropes`; None: nothing turns."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    biases: frozenset[str] = frozenset()
    """Those of `linears` that have one."""
    linears: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LINEARS)
    """A layer's linears -> by the family's names, whose rows follow one another in it."""
    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    """A layer's norms, those that it has -> by the family's names."""
    norm_offset: float = 0.0
    """What is added to every norm's weight as it stands in the file."""
    qk_norm: Literal["", "head", "row"] = ""
    """Queries and keys are normed: each head by itself, or all heads of a token together."""
    embedding_scale: float = 1.0
    """Of the LLM's own tokens."""
    input_scale: float = 1.0
    """Of all that goes into the first layer."""
    residual_scale: float = 1.0
    """Of what a layer adds."""
    softcap: float = 0.0
    """Attention's scores s become softcap tanh(s / softcap)."""
    is_bidirectional: bool = False
    """Whether it was trained with attention from both sides."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears that LoRA can adapt, by PEFT's names."""
        return tuple(name.split(".")[-1] for names in self.linears.values() for name in names)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one family's configuration says beyond what all say."""

    differs: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    """The fields of a `DecoderSpec` that are not as Llama's."""
    reads: tuple[str, ...] = ()
    """The configuration's fields that it looks at, beside `COMMON`."""
    is_partial: bool = False
    """Whether a head may turn in part."""


COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "use_bidirectional_attention",
)
WITHOUT_INFLUENCE = (  # on the states of a frozen model
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "pretraining_tp",
    "attention_dropout",  # and other dropout: it is for training the model itself
    "resid_pdrop",
    "embd_pdrop",
    "logits_scaling",
    "final_logit_softcapping",
    "use_sliding_window",  # sliding_window and layer_types follow it
    "max_window_layers",
    "no_rope_layer_interval",  # no_rope_layers follows it
)


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {"biases": _biases(config)}


def _qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"biases": frozenset({"qkv"})}


def _qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    return {"biases": _biases(config), "qk_norm": "head", "norms": LLAMA_NORMS | QK_NORMS}


def _smollm3(config: PreTrainedConfig) -> dict[str, Any]:
    ropes = tuple(0 if turns else None for turns in config.no_rope_layers)
    return {"biases": _biases(config), "rope_of": ropes}


def _granite(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "biases": _biases(config),
        "input_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention_scale": config.attention_multiplier,
    }


def _olmo2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"biases": _biases(config), "qk_norm": "row", "norms": POST_NORMS | QK_NORMS}


def _phi3(config: PreTrainedConfig) -> dict[str, Any]:
    return {"linears": FUSED}


def _gemma(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "biases": _biases(config),
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(config.hidden_size),
    }


def _gemma2(config: PreTrainedConfig) -> dict[str, Any]:
    return _gemma(config) | {
        "norms": GEMMA_NORMS | POST_NORMS,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "softcap": config.attn_logit_softcapping or 0.0,
    }


def _gemma3(config: PreTrainedConfig) -> dict[str, Any]:
    # Its attention has no cap, whatever the configuration says of one.
    norms = GEMMA_NORMS | POST_NORMS | QK_NORMS
    return _gemma2(config) | {"norms": norms, "qk_norm": "head", "softcap": 0.0}


ATTENTION_BIAS = ("attention_bias",)
BOTH_BIASES = (*ATTENTION_BIAS, "mlp_bias")
GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
GEMMA2 = (*ATTENTION_BIAS, "query_pre_attn_scalar", "attn_logit_softcapping")
FAMILIES = {  # by model_type
    "llama": Family(differs=_llama, reads=BOTH_BIASES),
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "qwen2": Family(differs=_qwen2),
    "qwen3": Family(differs=_qwen3, reads=ATTENTION_BIAS),
    "smollm3": Family(differs=_smollm3, reads=(*BOTH_BIASES, "no_rope_layers")),
    "granite": Family(differs=_granite, reads=(*BOTH_BIASES, *GRANITE)),
    "olmo2": Family(differs=_olmo2, reads=ATTENTION_BIAS),
    "phi3": Family(differs=_phi3, reads=("original_max_position_embeddings",), is_partial=True),
    "gemma": Family(differs=_gemma, reads=ATTENTION_BIAS),
    "gemma2": Family(differs=_gemma2, reads=GEMMA2),
    "gemma3_text": Family(differs=_gemma3, reads=GEMMA2),
}


def decided(family: str) -> frozenset[str]:
    """The fields of a family's configuration of which somebody has said what they mean here."""
    return frozenset((*COMMON, *FAMILIES[family].reads, *WITHOUT_INFLUENCE))


def read_config(folder: Path, key: str) -> PreTrainedConfig:
    """A model's config.json; none of its code is run.

    Args:
        key: Where the user named the folder.

    Raises:
        ValueError: It cannot be read, or is a quantised model's.
    """
    check_model(folder, key)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, huggingface_hub's own, ...
        if "trust_remote_code" in str(error):
            code = "its own code, which is never run"
            raise ValueError(f"{key}: {folder} is a model of {code}") from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{key}: {folder} has no readable config.json: {reason}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{key}: {folder} does not go in: {why_not(config)}")
    return config


def decoder_spec(config: PreTrainedConfig, name: str = "model.decoder") -> DecoderSpec:
    """What an LLM's configuration says of its forward.

    Args:
        name: Of the LLM, in messages.

    Raises:
        ValueError: It is of no family that goes in, or asks for what is not implemented.
    """
    text = config.get_text_config() if config.model_type in WRAPPERS else config
    row = FAMILIES.get(text.model_type)
    if row is None:
        reason = f", which does not go in: {why_not(config)}" if why_not(config) else ""
        takes = f"this takes {', '.join(FAMILIES)}"
        raise ValueError(f"{name} is a {text.model_type} model{reason}; {takes}")
    if text.num_hidden_layers < 1:
        raise ValueError(f"{name} has no layers, by its config.json")
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    max_length, limit = _limit(text)
    is_causal = getattr(text, "is_causal", True)
    differs = row.differs(text)
    scale = differs.pop("attention_scale", head_width**-0.5)
    kinds = list(_rope_parameters(text))
    options = {"is_partial": row.is_partial, "name": name}
    ropes = tuple(_rope(text, kind, head_width, scale, **options) for kind in kinds)
    of_layers = _own(text, "layer_types") if kinds[0] else [None] * text.num_hidden_layers
    if of_layers is None:
        raise ValueError(f"{name}: its rope_parameters are by kinds of layers, which it has not")
    differs.setdefault("rope_of", tuple(map(kinds.index, of_layers)))
    return DecoderSpec(
        family=text.model_type,
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        inner_width=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_width=head_width,
        eps=text.rms_norm_eps,
        max_length=max_length,
        limit=limit,
        ropes=ropes,
        activation=_activation(text, name),
        is_bidirectional=bool(getattr(text, "use_bidirectional_attention", False)) or not is_causal,
        **differs,
    )


def _own(config: PreTrainedConfig, key: str) -> Any:
    """The value of a field that the family has; of others, which configurations carry along, None:
    transformers does not look at them either."""
    is_own = key in (each.name for each in dataclasses.fields(config))
    return getattr(config, key) if is_own else None


def _biases(config: PreTrainedConfig) -> frozenset[str]:
    names = {"attention_bias": ("qkv", "out"), "mlp_bias": ("gate_up", "down")}
    return frozenset(
        name for key, linears in names.items() if _own(config, key) for name in linears
    )


def _activation(config: PreTrainedConfig, name: str) -> str:
    theirs = _own(config, "hidden_activation") or config.hidden_act
    if theirs not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{name}: activation {theirs!r} is not supported; this takes {known}")
    return ACTIVATIONS[theirs]


def _limit(config: PreTrainedConfig) -> tuple[int, str]:
    """Up to how many tokens a text is read as the LLM reads it, and what says so: its positions, a
    window that its attention looks through, or where it begins to read positions in another way.
    """
    limits = {"max_position_embeddings": config.max_position_embeddings}
    slides = "sliding_attention" in (_own(config, "layer_types") or ["sliding_attention"])
    if slides and _own(config, "sliding_window"):
        limits["sliding_window"] = config.sliding_window
    for rope in _rope_parameters(config).values():
        if rope.get("rope_type") == "longrope" or rope.get("llama_4_scaling_beta"):
            key = "original_max_position_embeddings"
            limits[key] = rope.get(key) or config.max_position_embeddings
    limit = min(limits, key=lambda key: limits[key])
    return limits[limit], limit


def _rope_parameters(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """By the type of layers that turn so; None: all do."""
    rope = config.rope_parameters
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    return nested if nested else {None: rope}


def _rope(
    config: PreTrainedConfig,
    kind: str | None,
    head_width: int,
    attention_scale: float,
    *,
    is_partial: bool,
    name: str,
) -> Rope:
    """The attention scale's root goes into cos and sin, where it differs from 1 / sqrt(K): it then
    multiplies queries and keys.
    """
    rope = _rope_parameters(config)[kind]
    rope_type, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and not is_partial and rope_type != "proportional":
        raise ValueError(f"{name}: partial_rotary_factor={share} is not implemented for its family")
    with torch.device("cpu"):
        if rope_type == "default":
            turning = int(head_width * share)
            exponents_k = torch.arange(0, turning, 2, dtype=torch.float32) / turning
            frequencies_k, scale = 1.0 / rope["rope_theta"] ** exponents_k, 1.0
        elif rope_type in ROPE_INIT_FUNCTIONS:
            compute = ROPE_INIT_FUNCTIONS[rope_type]
            try:
                frequencies_k, scale = compute(config, torch.device("cpu"), layer_type=kind)
            except (RuntimeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{name}: its rope_parameters do not hold: {reason}") from error
        else:
            known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
            raise ValueError(f"{name}: rope_type {rope_type!r} is not supported; use {known}")
    ratio = attention_scale * math.sqrt(head_width)
    if not math.isclose(ratio, 1.0, rel_tol=1e-12):
        if 2 * len(frequencies_k) != head_width:
            raise ValueError(f"{name}: heads that turn in part have no scale of their own")
        scale *= math.sqrt(ratio)
    return Rope(frequencies=tuple(frequencies_k.tolist()), scale=scale)
