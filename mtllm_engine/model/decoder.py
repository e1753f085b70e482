"""The LLM, of any of `families`, on packed tokens, with joint layers: student and teacher in one
call of each layer.

Under ZeRO-3 a layer's weights are gathered once for all its streams. Source: arXiv 2302.13971,
2407.21783; what other families do differently, `families` says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtllm_engine.config import LORA_TARGETS, LoraConfig
from mtllm_engine.data.batch import Tokens
from mtllm_engine.kernels.contract import Kernel, Update
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.kernels.rope import rope
from mtllm_engine.kernels.swiglu import swiglu
from mtllm_engine.model.activations import Recompute, Shared, kept, rebuilt
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.model.lora import LoraLinear, Members

Turns = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of each token's rotary angles, fp32 (S, k)."""


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """One of the token streams that run through the decoder together."""

    tokens: Tokens
    turns: tuple[Turns, ...]
    """By kind of rope."""
    adapters: str | None
    """The set that runs: "student" (trained), "teacher" (frozen); None: the bare LLM."""
    grad: bool
    """Without, the layer runs under no_grad."""


class DecoderLayer(nn.Module):
    """Rotary grouped-query attention and a gated MLP, RMSNorms before or after each."""

    def __init__(
        self,
        spec: DecoderSpec,
        adapters: Mapping[str, LoraConfig],
        dtype: torch.dtype,
        attention: Kernel,
        *,
        layer: int,
        causal: bool,
        recompute: str,
        defers: bool,
    ) -> None:
        """Args: defers: What the adapters of gate and up add is left to SwiGLU, where it can be."""
        super().__init__()
        self.defers = defers
        self.spec, self.attention, self.rope = spec, attention, spec.rope_of[layer]
        self.causal, self.recompute, self.eps = causal, recompute, spec.eps
        q_width, kv_width = (num * spec.head_width for num in (spec.num_heads, spec.num_kv_heads))
        # Norms; those that the family lacks are None.
        rows = {"q_norm": q_width, "k_norm": kv_width}
        heads = dict.fromkeys(rows, spec.head_width)
        widths = heads if spec.qk_norm == "head" else rows
        for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", *rows):
            weight = norm_weight(spec, widths.get(name, spec.width), dtype)
            self.register_parameter(name, weight if name in spec.norms else None)
        # Linears
        inner = spec.inner_width
        outputs = {"qkv": (q_width, kv_width, kv_width), "gate_up": (inner, inner)}
        inputs = {"qkv": spec.width, "out": q_width, "gate_up": spec.width, "down": inner}
        for name, in_width in inputs.items():
            widths = outputs.get(name, (spec.width,))
            members = _members(spec, name, widths, layer)
            bias = name in spec.biases
            self.add_module(name, LoraLinear(in_width, members, adapters, dtype, bias=bias))

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
        normed_SD, _ = self._norm(hidden_SD, self.attention_norm)
        normed = self._normed(hidden_SD, self.attention_norm)
        with rebuilt(normed_SD, normed, self.qkv):
            qkv_SF = self.qkv(normed_SD, **call)
        context_SD = self._attend(qkv_SF, stream)
        # The residual's sum and its norm are one kernel; the MLP's input is made again like
        # attention's, from the sum.
        attended_SD = self._added(self.out(context_SD, **call), self.attention_post_norm)
        normed_SD, hidden_SD = self._norm(attended_SD, self.mlp_norm, hidden_SD)
        normed = self._normed(hidden_SD, self.mlp_norm)
        inner_SD = self._feed_forward(normed_SD, normed, call, rebuilt)
        return self._added(inner_SD, self.mlp_post_norm).add_(hidden_SD)

    def _feed_forward(
        self, normed_SD: torch.Tensor, normed: Recompute | None, call: dict, rebuilt: Callable
    ) -> torch.Tensor:
        with rebuilt(normed_SD, normed, self.gate_up):
            gate_up_SF, update = self._gate_up(normed_SD, call)
        # SwiGLU's own input: kept, or (the layer's widest tensor) made again by one more product,
        # whose result two places of backward share.
        makes_again = self.recompute == "mlp"
        source = normed or normed_SD.detach
        made_again = Shared(lambda: self._gate_up(source(), call)[0])
        again = made_again if makes_again else gate_up_SF.detach
        with (rebuilt if makes_again else kept)(gate_up_SF, again, self.gate_up):
            inner_SF = self._gated(gate_up_SF, update)
        # SwiGLU's output, half as wide again, is never kept: it is one cheap pass over its input.
        with rebuilt(inner_SF, lambda: self._gated(again(), update), self.down):
            return self.down(inner_SF, **call)

    def _gate_up(self, normed_SD: torch.Tensor, call: dict) -> tuple[torch.Tensor, Update | None]:
        """SwiGLU's input (S, 2F), and what it is to add to it."""
        if self.defers:
            return self.gate_up(normed_SD, **call, deferred=True)
        return self.gate_up(normed_SD, **call), None

    def _norm(
        self,
        x_SD: torch.Tensor,
        weight_D: nn.Parameter | None,
        residual_SD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum of x and residual, and the sum; without a norm the sum twice."""
        if weight_D is not None:
            return rms_norm(x_SD, weight_D, self.eps, residual_SD)
        sum_SD = x_SD if residual_SD is None else x_SD.add_(residual_SD)
        return sum_SD, sum_SD

    def _normed(self, hidden_SD: torch.Tensor, weight_D: nn.Parameter | None) -> Recompute | None:
        """Makes a normed state again; None where no norm made it: it is kept anyway."""
        hidden_SD = hidden_SD.detach()
        return None if weight_D is None else lambda: self._norm(hidden_SD, weight_D)[0]

    def _added(self, x_SD: torch.Tensor, weight_D: nn.Parameter | None) -> torch.Tensor:
        """What a half of the layer adds to its input: normed where the family norms it, scaled
        where it scales it."""
        x_SD, _ = self._norm(x_SD, weight_D)
        scale = self.spec.residual_scale
        return x_SD if scale == 1.0 else x_SD.mul_(scale)

    def _gated(self, gate_up_SF: torch.Tensor, update: Update | None) -> torch.Tensor:
        return swiglu(gate_up_SF, self.spec.activation, update)

    def _attend(self, qkv_SF: torch.Tensor, stream: TokenStream) -> torch.Tensor:
        nums = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        heads = qkv_SF.unflatten(-1, (sum(nums), -1))  # q's, k's and v's, of which v's do not turn
        if self.q_norm is not None:
            heads = self._with_normed_heads(heads, nums)
        if self.rope is not None:
            heads = rope(heads, *stream.turns[self.rope], nums[0] + nums[1])
        q_SHK, k_SGK, v_SGK = heads.split(nums, dim=1)
        options = {"cu_seqlens": stream.tokens.cu_seqlens, "lengths": stream.tokens.lengths}
        if self.spec.softcap:
            options["softcap"] = self.spec.softcap
        return self.attention(q_SHK, k_SGK, v_SGK, **options, causal=self.causal).flatten(1)

    def _with_normed_heads(self, heads: torch.Tensor, nums: tuple[int, ...]) -> torch.Tensor:
        """The packed heads (S, H + 2G, K), queries and keys normed."""
        q_SHK, k_SGK, v_SGK = heads.split(nums, dim=1)
        normed = [
            rms_norm(x.contiguous().view(-1, len(weight)), weight, self.eps)[0].view(x.shape)
            for x, weight in ((q_SHK, self.q_norm), (k_SGK, self.k_norm))
        ]
        return torch.cat([*normed, v_SGK], dim=1)


class Decoder(nn.Module):
    """Embedding and layers; the final norm is the objective's, which pools what it normalises."""

    def __init__(
        self,
        spec: DecoderSpec,
        adapters: Mapping[str, LoraConfig],
        dtype: torch.dtype,
        attention: Kernel,
        *,
        causal: bool,
        recompute: str,
        defers: bool,
    ) -> None:
        super().__init__()
        self.spec, self.defers = spec, defers
        # Rounded as the family's own code does: that is what its models were trained with.
        self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype, device="cpu").item()
        # On a real device, whatever the rest is made on; the engine moves them with it.
        self.frequencies = tuple(
            torch.tensor(kind.frequencies, device="cpu") for kind in spec.ropes
        )
        self.embedding = nn.Embedding(spec.vocab_size, spec.width, dtype=dtype)
        options = {"causal": causal, "recompute": recompute, "defers": defers}
        self.layers = nn.ModuleList(
            DecoderLayer(spec, adapters, dtype, attention, layer=layer, **options)
            for layer in range(spec.num_layers)
        )

    def embed(self, ids_S: torch.Tensor) -> torch.Tensor:
        """The LLM's own states (S, D) of its tokens, as they go in."""
        hidden_SD = self.embedding(ids_S)
        return hidden_SD if self.embedding_scale == 1.0 else hidden_SD * self.embedding_scale

    def stream(self, tokens: Tokens, *, adapters: str | None, grad: bool) -> TokenStream:
        """A stream with its rotary angles, computed once for all layers."""
        turns = []
        for kind, frequencies_k in zip(self.spec.ropes, self.frequencies, strict=True):
            angles_Sk = tokens.positions_S.float()[:, None] * frequencies_k
            turn = (angles_Sk.cos(), angles_Sk.sin())
            turns.append(turn if kind.scale == 1.0 else tuple(each * kind.scale for each in turn))
        return TokenStream(tokens=tokens, turns=tuple(turns), adapters=adapters, grad=grad)

    def forward(
        self, hidden: Sequence[torch.Tensor], streams: Sequence[TokenStream]
    ) -> tuple[torch.Tensor, ...]:
        """States in, states before the final norm out, one per stream."""
        scale = self.spec.input_scale
        hidden = tuple(hidden) if scale == 1.0 else tuple(each * scale for each in hidden)
        for layer in self.layers:
            hidden = layer(*hidden, streams=streams)
        return hidden


def norm_weight(spec: DecoderSpec, width: int, dtype: torch.dtype) -> nn.Parameter:
    """Of a RMSNorm, not filled yet: in fp32 where the file holds what is to be added to 1, of which
    half precision would lose half the digits."""
    return nn.Parameter(torch.empty(width, dtype=torch.float32 if spec.norm_offset else dtype))


def _members(spec: DecoderSpec, name: str, widths: tuple[int, ...], layer: int) -> Members:
    """The family's linears in one of ours, and their numbers for dropout.

    Linear i of Llama's seven in layer l is number 7 l + i. Others have numbers from 7 times the
    layers on.
    """
    names = tuple(each.split(".")[-1] for each in spec.linears[name])
    others = [each for each in spec.targets if each not in LORA_TARGETS]
    numbers = tuple(
        layer * len(LORA_TARGETS) + LORA_TARGETS.index(each)
        if each in LORA_TARGETS
        else spec.num_layers * len(LORA_TARGETS) + layer * len(others) + others.index(each)
        for each in names
    )
    widths = widths if len(widths) == len(names) else (sum(widths),)
    return Members(names=names, widths=widths, numbers=numbers)
