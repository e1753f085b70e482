"""Shapes of well-known models, by their names: what can be reckoned with where a model is not at
hand. Nothing is ever built from them to be filled with weights that a user named.
"""

from pathlib import Path

from transformers import (
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    M2M100Config,
    PreTrainedConfig,
    Qwen3Config,
    XLMRobertaConfig,
)

ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def _m2m100(*, width: int, layers: int, ffn: int) -> M2M100Config:
    return M2M100Config(
        vocab_size=256206,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=16,
        encoder_ffn_dim=ffn,
        scale_embedding=True,
    )


def _decoder(
    kind: type[PreTrainedConfig],
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    **others: int | None,
) -> PreTrainedConfig:
    return kind(
        **others,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=8192,
        rope_parameters=None if kind is Gemma3TextConfig else ROPE,
    )


ENCODERS: dict[str, PreTrainedConfig] = {
    "nllb-200-distilled-600m": _m2m100(width=1024, layers=12, ffn=4096),
    "nllb-200-distilled-1.3b": _m2m100(width=1024, layers=24, ffn=8192),
    "nllb-200-1.3b": _m2m100(width=1024, layers=24, ffn=8192),
    "nllb-200-3.3b": _m2m100(width=2048, layers=24, ffn=8192),
    "multilingual-e5-small": BertConfig(
        vocab_size=250037,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
    ),
    "multilingual-e5-large": XLMRobertaConfig(
        vocab_size=250002,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
    ),
}
"""By the model's name on the hub, its owner's aside, in small letters."""

_LLAMA_8B = _decoder(
    LlamaConfig, vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336
)
_LLAMA_70B = _decoder(
    LlamaConfig, vocab_size=128256, width=8192, layers=80, heads=64, kv_heads=8, ffn=28672
)
DECODERS: dict[str, PreTrainedConfig] = {
    "llama-3-8b": _LLAMA_8B,
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3-70b": _LLAMA_70B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.3-70b": _LLAMA_70B,
    "qwen3-8b": _decoder(
        Qwen3Config, vocab_size=151936, width=4096, layers=36, heads=32, kv_heads=8, ffn=12288
    ),
    "gemma-3-4b": _decoder(
        Gemma3TextConfig,
        vocab_size=262208,
        width=2560,
        layers=34,
        heads=8,
        kv_heads=4,
        ffn=10240,
        sliding_window=1024,
    ),
    "smollm2-135m": _decoder(
        LlamaConfig, vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536
    ),
}
"""Likewise, but a model's name only has to contain one: `Meta-Llama-3-8B-Instruct` is as large as
any other Llama-3-8B."""


def known_encoder(name: str) -> tuple[str, PreTrainedConfig] | None:
    """The known model that an encoder's name, a hub id or a folder's, is of; None: no such."""
    last = Path(name).name.lower()
    return (last, ENCODERS[last]) if last in ENCODERS else None


def known_decoder(name: str) -> tuple[str, PreTrainedConfig] | None:
    """As `known_encoder`, of an LLM's name that contains the known one's."""
    last = Path(name).name.lower()
    return next(((key, each) for key, each in DECODERS.items() if key in last), None)
