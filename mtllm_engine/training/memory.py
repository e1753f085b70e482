"""What a run needs, before it is queued: the memory of one GPU, line by line. An estimate: nothing
here is measured.

Sizes come from the stack itself, built on the meta device, and from the DeepSpeed configuration
that training uses.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.kernels.lora_linear.quantised import BLOCK, BYTES, OUTER_BLOCK, Fp8
from mtllm_engine.model.families import POST_NORMS, DecoderSpec
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.stack import Stack
from mtllm_engine.training.engine import deepspeed_config
from mtllm_engine.world import World

PLAIN_TRAINED = 16  # bytes of a trained number in fp32: value, gradient, two moments
# Under ZeRO-3, of this rank's share: its slice, the optimizer's, two of gradients, two moments.
ZERO_TRAINED = 24
# CUDA's context, NCCL, workspaces of libraries, and what fragmentation of the allocator costs.
ASSUMED = 2 << 30
REDUCE_BUCKET = 500_000_000  # DeepSpeed's own default, in numbers

HELD = ("LLM's linears", "other frozen weights", "frozen weights", "a copy in each node")
HELD += ("encoder", "trained")
"""Rows of weights, and of what is trained."""


class Row(NamedTuple):
    """One line of the estimate, of one GPU."""

    name: str
    bytes: int
    how: str  # in words


class Piece(NamedTuple):
    """A tensor that ZeRO-3 slices and gathers."""

    numbers: int
    width: int
    """Bytes of a number."""
    learns: bool

    @property
    def bytes(self) -> int:
        return self.numbers * self.width

    def slice_bytes(self, world_size: int) -> int:
        """A rank's part; slices are equally long, so the last may be padded."""
        return -(-self.numbers // world_size) * self.width


@dataclass(frozen=True, kw_only=True, eq=False)
class Models:
    """Both models by their configurations, and the stack of them on the meta device, unsharded."""

    encoder: PreTrainedConfig
    decoder: DecoderSpec
    stack: Stack

    @cached_property
    def num_weights(self) -> int:
        """Of the LLM's linears: N of a step's work."""
        return sum(each.weight.numel() for each in lora_linears(self.stack))


def estimate(
    config: Config,
    encoder: PreTrainedConfig,
    decoder: DecoderSpec,
    world_size: int,
    *,
    node_size: int = 0,
) -> list[Row]:
    """`rows` of models that are not at hand as a stack."""
    return rows(config, unfilled(config, encoder, decoder), world_size, node_size=node_size)


def unfilled(config: Config, encoder: PreTrainedConfig, decoder: DecoderSpec) -> Models:
    """Both models, and their stack without weights."""
    with torch.device("meta"):
        stack = Stack(config, encoder, decoder)
    return Models(encoder=encoder, decoder=decoder, stack=stack)


def rows(config: Config, models: Models, world_size: int, *, node_size: int = 0) -> list[Row]:
    """What the backward of the longest micro-batch finds in a GPU's memory (never any logits).

    Args:
        config: `zero.stage`, 0 or 3, says how the weights lie.
        node_size: GPUs of a node that share a second copy of the frozen weights among them; 0:
            there is none.
    """
    most = replace(config.memory, max_tokens=most_tokens(config, world_size))
    config, stack = replace(config, memory=most), models.stack
    if config.zero.stage == 3:
        found = _sharded(config, stack, world_size, node_size)
    else:
        found = _whole(config, stack)
    found += _states(config, models.encoder, models.decoder)
    if isinstance(stack.encoder, PaddedEncoder):
        found[:0] = _padded(config, stack.encoder)
    return found


def most_tokens(config: Config, world_size: int) -> int:
    """Of a micro-batch: no more than a rank's packs have."""
    data = config.data
    pack = data.pack_tokens or data.pack_documents * data.max_length
    return min(config.memory.max_tokens, math.ceil(data.lanes / world_size) * pack)


def total(rows: Sequence[Row]) -> int:
    return sum(row.bytes for row in rows)


def held(rows: Sequence[Row]) -> int:
    """The bytes of what is there whatever a micro-batch has: weights, and what is trained."""
    return sum(row.bytes for row in rows if row.name in HELD)


def saved_bytes(decoder: DecoderSpec, lora: LoraConfig, dtype: torch.dtype, recompute: str) -> int:
    """What autograd keeps of one student token in one decoder layer, every linear adapted, by the
    CUDA implementations.

    The layer's input; unless the layer is recomputed, also the state between attention and MLP, q
    and the attention's output, k and v, adapters' low-rank activations and the softmax's fp32 sums;
    with "cheap", gate and up too.
    """
    if recompute == "layer":
        return decoder.width * dtype.itemsize
    heads_width = decoder.num_heads * decoder.head_width
    kv_width = decoder.num_kv_heads * decoder.head_width
    wide = 2 * decoder.width + 2 * heads_width + 2 * kv_width
    wide += decoder.width * len(POST_NORMS.keys() & decoder.norms.keys())  # what they norm
    wide += (heads_width + kv_width) * bool(decoder.qk_norm)
    wide += 2 * decoder.inner_width if recompute == "cheap" else 0
    low = len(lora.target_modules) * max(16, 1 << (lora.rank - 1).bit_length())
    return (wide + low) * dtype.itemsize + 4 * decoder.num_heads


def pieces(config: Config, module: nn.Module) -> tuple[Piece, ...]:
    """What ZeRO-3 holds of a module, which is not sharded yet: its parameters, and in the place of
    a quantised weight what stands for it."""
    return _pieces(config.model.quantization, module)


@lru_cache(maxsize=1024)  # a plan asks for the same layers again and again
def _pieces(form: str, module: nn.Module) -> tuple[Piece, ...]:
    linears = [item.weight for item in lora_linears(module) if form != "none"]
    quantised = {id(weight) for weight in linears}
    found = [
        Piece(each.numel(), each.element_size(), each.requires_grad)
        for each in module.parameters()
        if id(each) not in quantised
    ]
    return (*found, *(_quantised(form, *weight.shape) for weight in linears))


def zero_options(config: Config, stack: Stack, world_size: int) -> dict[str, Any]:
    """DeepSpeed's ZeRO-3, as these ranks would run it: its limits follow from a layer, quantised as
    it will be."""
    world = World(rank=0, size=world_size, local_rank=0, device=torch.device("cuda"))
    layers = [_as_held(config, stack.decoder.layers[0])]
    decoder = SimpleNamespace(layers=layers)
    like: Any = SimpleNamespace(named_parameters=stack.named_parameters, decoder=decoder)
    return deepspeed_config(config, world, like)["zero_optimization"]


def _as_held(config: Config, layer: nn.Module) -> nn.Module:
    """A copy on the meta device with payloads in the place of quantised weights."""
    if config.model.quantization == "none":
        return layer
    layer = copy.deepcopy(layer)
    for linear in lora_linears(layer):
        shape = linear.weight.shape
        size = _quantised(config.model.quantization, *shape).numbers
        payload = torch.empty(size, dtype=torch.uint8, device="meta")
        linear.payload = nn.Parameter(payload, requires_grad=False)
        del linear.weight
        linear.weight = Fp8(shape=shape, payload=linear.payload, transposed_DF=None)  # or Nf4
    return layer


def _quantised(form: str, rows: int, columns: int) -> Piece:
    """A sharded linear's weight: one copy with its scales, as bytes."""
    count = rows * columns
    if form == "fp8":
        return Piece(count + 4 * rows, 1, False)
    blocks = -(-count // BLOCK)  # two weights in a byte, a scale for each block, scales of those
    return Piece(-(-count // 2) + blocks + 4 * (-(-blocks // OUTER_BLOCK) + 1), 1, False)


def _whole(config: Config, stack: Stack) -> list[Row]:
    linears, others, trained = _sizes(stack)
    width, form = getattr(torch, config.model.dtype).itemsize, config.model.quantization
    quantised, name = (
        int(linears * BYTES.get(form, width)),
        form.replace("none", config.model.dtype),
    )
    packed = "" if isinstance(stack.encoder, PaddedEncoder) else "encoder, "
    rows = [
        Row("LLM's linears", quantised, f"{linears:,} weights, {name}"),
        Row(
            "other frozen weights",
            others * width,
            f"{others:,} weights: {packed}embeddings, norms",
        ),
        Row("trained", PLAIN_TRAINED * trained, f"{trained:,} in fp32, gradients, two moments"),
    ]
    return rows + _made_full(config, stack) * (form == "nf4")


def _sharded(config: Config, stack: Stack, world_size: int, node_size: int) -> list[Row]:
    zero, share = zero_options(config, stack, world_size), f"1/{world_size} of"
    every = pieces(config, stack)
    frozen = [each for each in every if not each.learns]
    trained = sum(each.numbers for each in every if each.learns)
    limit = zero["stage3_param_persistence_threshold"]
    small = [each for each in every if each.numbers <= limit]
    live, counted = _live(config, stack, zero, frozen)
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    slices = (each.slice_bytes(world_size) for each in frozen)
    states = ZERO_TRAINED * trained // world_size
    weights, kept = (sum(each.numbers for each in some) for some in (frozen, small))
    name = config.model.quantization.replace("none", config.model.dtype)
    rows = [Row("frozen weights", sum(slices), f"{share} {weights:,} numbers, {name}")]
    if node_size:
        copies = sum(each.slice_bytes(node_size) for each in every)
        rows.append(Row("a copy in each node", copies, f"1/{node_size} of all once more"))
    rows += [
        Row("gathered weights", live, f"{counted:,} numbers live at most"),
        Row("trained", states, f"{share} {trained:,} with their states"),
        Row("small ones kept whole", sum(each.bytes for each in small), f"{kept:,} numbers"),
        Row("gradient bucket", 4 * bucket, f"{bucket:,} fp32 numbers: reduce_bucket_size"),
    ]
    return rows + _made_full(config, stack) * (config.model.quantization != "none")


def _live(
    config: Config, stack: Stack, zero: dict[str, Any], frozen: Sequence[Piece]
) -> tuple[int, int]:
    """Bytes and numbers of frozen weights that are gathered at once. DeepSpeed's limit counts
    numbers, whatever a number is."""
    leaves = [[each for each in pieces(config, leaf) if not each.learns] for leaf in stack.leaves]
    layer = [each for each in pieces(config, stack.decoder.layers[0]) if not each.learns]
    width = sum(each.bytes for each in layer) / sum(each.numbers for each in layer)
    largest = max(leaves, key=lambda leaf: sum(each.bytes for each in leaf))
    numbers, limit = sum(each.numbers for each in frozen), zero["stage3_max_live_parameters"]
    if numbers <= limit:
        return sum(each.bytes for each in frozen), numbers
    sizes = (
        (int(limit * width), limit),
        (
            sum(each.bytes for each in largest),
            sum(each.numbers for each in largest),
        ),
    )
    return max(sizes)


def _made_full(config: Config, stack: Stack) -> list[Row]:
    """What one product of a quantised weight makes for its own length: the weight in the model's
    dtype, or in fp8 and sharded its transpose."""
    largest = max(item.weight.numel() for item in lora_linears(stack))
    if config.model.quantization == "fp8":
        return [Row("a linear's transpose", largest, f"{largest:,} weights")]
    width = getattr(torch, config.model.dtype).itemsize
    return [Row("a linear made full", largest * width, f"{largest:,} weights")]


def _padded(config: Config, encoder: PaddedEncoder) -> list[Row]:
    """What an encoder of transformers' class adds, which no rank shares with another."""
    width = getattr(torch, config.model.dtype).itemsize
    tokens, longest = encoder.most_tokens(config.memory.max_tokens), config.data.max_length
    states = 4 * encoder.width + 3 * encoder.inner_width + encoder.num_biases * longest
    how = f"{tokens:,} tokens x {states * width / 1024:.0f} KiB"
    return [
        Row(
            "encoder",
            encoder.num_weights * width,
            f"{encoder.num_weights:,} weights, whole on each rank",
        ),
        Row("a group of texts", tokens * states * width, f"{how}: padded, in a layer"),
    ]


def _states(config: Config, encoder: PreTrainedConfig, decoder: DecoderSpec) -> list[Row]:
    """What grows with memory.max_tokens. In a layer's backward its gradients are live beside what
    was saved."""
    dtype, tokens = getattr(torch, config.model.dtype), config.memory.max_tokens
    layers, width, inner = decoder.num_layers, decoder.width, decoder.inner_width
    # What is saved, all layers', and what backward makes again, one layer at a time.
    kinds = (config.memory.recompute, "cheap")
    layer, whole = (saved_bytes(decoder, config.lora, dtype, kind) for kind in kinds)
    saved, how = layers * layer, f"{layers} layers x {layer / 1024:.1f} KiB"
    if layer < whole:
        saved, how = saved + whole - layer, f"{how} + {(whole - layer) / 1024:.1f} KiB"
    # A layer's gradients; with fp8 the widest of them is scaled twice and rounded.
    working = (4 * inner + 4 * width) * dtype.itemsize
    if config.model.quantization == "fp8":
        working += 2 * inner * (2 * dtype.itemsize + 1)
    both = (4 * width + 2 * encoder.hidden_size) * dtype.itemsize
    each = f"{tokens:,} tokens x"
    return [
        Row("saved activations", tokens * saved, f"{tokens:,} student tokens x ({how})"),
        Row("a layer's gradients", tokens * working, f"{each} {working / 1024:.0f} KiB"),
        Row("other states", tokens * both, f"{each} {both / 1024:.0f} KiB: both streams"),
        Row("assumed", ASSUMED, "CUDA, NCCL, workspaces, fragmentation"),
    ]


def _sizes(stack: Stack) -> tuple[int, int, int]:
    """Numbers of weights: the LLM's linears, all else that is frozen, what is trained."""
    linears = sum(item.weight.numel() for item in lora_linears(stack))
    trained = sum(item.numel() for item in stack.parameters() if item.requires_grad)
    return linears, sum(item.numel() for item in stack.parameters()) - linears - trained, trained


def lora_linears(stack: nn.Module) -> list[LoraLinear]:
    return [item for item in stack.modules() if isinstance(item, LoraLinear)]
