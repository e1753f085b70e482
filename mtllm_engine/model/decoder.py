"""The LLM (Llama family) on packed tokens, with joint layers: student and teacher in one call of
each layer.

Under ZeRO-3 a layer's weights are gathered once for all its streams. Source: arXiv 2302.13971,
2407.21783.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from mtllm_engine.config import LoraConfig
from mtllm_engine.data.batch import Tokens
from mtllm_engine.kernels.contract import Kernel
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.kernels.rope import rope
from mtllm_engine.kernels.swiglu import swiglu
from mtllm_engine.model.activations import Recompute, Shared, kept, rebuilt
from mtllm_engine.model.lora import LoraLinear, Members


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """One of the token streams that run through the decoder together."""

    tokens: Tokens
    cos_Sk: torch.Tensor  # fp32
    sin_Sk: torch.Tensor
    adapters: str | None
    """The set that runs: "student" (trained), "teacher" (frozen); None: the bare LLM."""
    grad: bool
    """Without, the layer runs under no_grad."""


class DecoderLayer(nn.Module):
    """RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU."""

    def __init__(
        self,
        config: LlamaConfig,
        adapters: Mapping[str, LoraConfig],
        dtype: torch.dtype,
        attention: Kernel,
        *,
        layer: int,
        causal: bool,
        recompute: str,
    ) -> None:
        super().__init__()
        self.attention = attention
        width, inner = config.hidden_size, config.intermediate_size
        head_width = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.causal, self.recompute, self.eps = causal, recompute, config.rms_norm_eps
        self.attention_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.mlp_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        q_width, kv_width = self.num_heads * head_width, self.num_kv_heads * head_width

        def linear(
            in_width: int, names: tuple[str, ...], widths: tuple[int, ...], bias: bool
        ) -> LoraLinear:
            members = Members(names=names, widths=widths)
            return LoraLinear(in_width, members, adapters, dtype, layer=layer, bias=bias)

        qkv_widths = (q_width, kv_width, kv_width)
        self.qkv = linear(width, ("q_proj", "k_proj", "v_proj"), qkv_widths, config.attention_bias)
        self.out = linear(q_width, ("o_proj",), (width,), config.attention_bias)
        self.gate_up = linear(width, ("gate_proj", "up_proj"), (inner, inner), config.mlp_bias)
        self.down = linear(inner, ("down_proj",), (width,), config.mlp_bias)

    def forward(
        self, *hidden: torch.Tensor, streams: Sequence[TokenStream]
    ) -> tuple[torch.Tensor, ...]:
        """One state (S, D) per stream in, one out. States are positional: module hooks see only
        such tensors.

        Streams without a gradient run first: what they need for a moment then does not add to what
        the layer keeps.
        """
        outputs = list(hidden)
        for index in sorted(range(len(streams)), key=lambda index: streams[index].grad):
            outputs[index] = self._run(hidden[index], streams[index])
        return tuple(outputs)

    def _run(self, hidden_SD: torch.Tensor, stream: TokenStream) -> torch.Tensor:
        if not (stream.grad and torch.is_grad_enabled()):
            with torch.no_grad():
                return self._block(hidden_SD, stream)
        if self.recompute == "layer":
            return checkpoint(
                self._block, hidden_SD, stream, use_reentrant=False, preserve_rng_state=False
            )
        return self._block(hidden_SD, stream, rebuilt)

    def _block(
        self, hidden_SD: torch.Tensor, stream: TokenStream, rebuilt: Callable = kept
    ) -> torch.Tensor:
        """Args: rebuilt: `activations.rebuilt`, or `kept`."""
        call = {"adapters": stream.adapters, "seeds_S": stream.tokens.seeds_S}
        # Attention. The normed state is a cheap pass over hidden_SD, which is kept anyway, so what
        # the adapters need of it in backward is made again there.
        normed_SD, _ = rms_norm(hidden_SD, self.attention_norm, self.eps)
        with rebuilt(normed_SD, self._normed(hidden_SD, self.attention_norm), self.qkv):
            qkv_SF = self.qkv(normed_SD, **call)
        context_SD = self._attend(qkv_SF, stream)
        # The residual's sum and its norm are one kernel; the MLP's input is made again like
        # attention's, from the sum.
        attended_SD = self.out(context_SD, **call)
        normed_SD, hidden_SD = rms_norm(attended_SD, self.mlp_norm, self.eps, hidden_SD)
        normed = self._normed(hidden_SD, self.mlp_norm)
        return self._feed_forward(normed_SD, normed, call, rebuilt).add_(hidden_SD)

    def _feed_forward(
        self, normed_SD: torch.Tensor, normed: Recompute, call: dict, rebuilt: Callable
    ) -> torch.Tensor:
        with rebuilt(normed_SD, normed, self.gate_up):
            gate_up_SF = self.gate_up(normed_SD, **call)
        # SwiGLU's own input: kept, or (the layer's widest tensor) made again by one more product,
        # whose result two places of backward share.
        makes_again = self.recompute == "mlp"
        again = Shared(lambda: self.gate_up(normed(), **call)) if makes_again else gate_up_SF.detach
        with (rebuilt if makes_again else kept)(gate_up_SF, again, self.gate_up):
            inner_SF = swiglu(gate_up_SF)
        # SwiGLU's output, half as wide again, is never kept: it is one cheap pass over its input.
        with rebuilt(inner_SF, lambda: swiglu(again()), self.down):
            return self.down(inner_SF, **call)

    def _normed(self, hidden_SD: torch.Tensor, weight_D: nn.Parameter) -> Recompute:
        hidden_SD = hidden_SD.detach()
        return lambda: rms_norm(hidden_SD, weight_D, self.eps)[0]

    def _attend(self, qkv_SF: torch.Tensor, stream: TokenStream) -> torch.Tensor:
        nums = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        heads = qkv_SF.unflatten(-1, (sum(nums), -1))  # q's, k's and v's, of which v's do not turn
        heads = rope(heads, stream.cos_Sk, stream.sin_Sk, self.num_heads + self.num_kv_heads)
        q_SHK, k_SGK, v_SGK = heads.split(nums, dim=1)
        packing = {"cu_seqlens": stream.tokens.cu_seqlens, "lengths": stream.tokens.lengths}
        return self.attention(q_SHK, k_SGK, v_SGK, **packing, causal=self.causal).flatten(1)


class Decoder(nn.Module):
    """Embedding and layers; the final norm is the objective's, which pools what it normalises."""

    def __init__(
        self,
        config: LlamaConfig,
        adapters: Mapping[str, LoraConfig],
        dtype: torch.dtype,
        attention: Kernel,
        *,
        causal: bool,
        recompute: str,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        options = {"causal": causal, "recompute": recompute}
        self.layers = nn.ModuleList(
            DecoderLayer(config, adapters, dtype, attention, layer=layer, **options)
            for layer in range(config.num_hidden_layers)
        )
        self.register_buffer("frequencies_k", rope_frequencies(config), persistent=False)

    def stream(self, tokens: Tokens, *, adapters: str | None, grad: bool) -> TokenStream:
        """A stream with its rotary angles, computed once for all layers."""
        angles_Sk = tokens.positions_S.float()[:, None] * self.frequencies_k
        return TokenStream(
            tokens=tokens,
            cos_Sk=angles_Sk.cos(),
            sin_Sk=angles_Sk.sin(),
            adapters=adapters,
            grad=grad,
        )

    def forward(
        self, hidden: Sequence[torch.Tensor], streams: Sequence[TokenStream]
    ) -> tuple[torch.Tensor, ...]:
        """States in, states before the final norm out, one per stream."""
        hidden = tuple(hidden)
        for layer in self.layers:
            hidden = layer(*hidden, streams=streams)
        return hidden


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Rotary frequencies (K / 2,), fp32, always on a real device; `default`, `linear` and `llama3`
    scaling.

    Raises:
        ValueError: The checkpoint asks for another scaling.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    exponents_k = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    frequencies_k = 1.0 / rope["rope_theta"] ** exponents_k
    if kind == "default":
        return frequencies_k
    if kind == "linear":
        return frequencies_k / rope["factor"]
    if kind == "llama3":
        return _llama3_frequencies(frequencies_k, rope)
    raise ValueError(f"rope_type {kind!r} is not supported; use default, linear or llama3")


def _llama3_frequencies(frequencies_k: torch.Tensor, rope: dict) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, the middle interpolated (Llama
    3.1).
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns_k = rope["original_max_position_embeddings"] * frequencies_k / (2 * math.pi)
    smooth_k = ((turns_k - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_k) * frequencies_k / rope["factor"] + smooth_k * frequencies_k
