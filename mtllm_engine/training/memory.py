"""What a run needs, before it is queued: the memory of one GPU, line by line. An estimate: nothing
here is measured.

Sizes come from the stack itself, built on the meta device, and from the DeepSpeed configuration
that training uses.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.kernels.lora_linear.quantised import BYTES
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

HELD = ("LLM's linears", "other frozen weights", "frozen weights", "encoder", "trained")
"""Rows of weights, and of what is trained."""


class Row(NamedTuple):
    """One line of the estimate, of one GPU."""

    name: str
    bytes: int
    how: str  # in words


def estimate(
    config: Config, encoder: PreTrainedConfig, decoder: DecoderSpec, world_size: int
) -> list[Row]:
    """What the backward of the longest micro-batch finds in a GPU's memory (never any logits)."""
    data, most = config.data, config.memory.max_tokens
    # A rank's step has no more tokens than its packs.
    pack = data.pack_tokens or data.pack_documents * data.max_length
    most = min(most, math.ceil(data.lanes / world_size) * pack)
    config = replace(config, memory=replace(config.memory, max_tokens=most))
    with torch.device("meta"):
        stack = Stack(config, encoder, decoder)
    held = _sharded if config.zero.stage == 3 else _whole
    rows = [*held(config, stack, world_size), *_states(config, encoder, decoder)]
    if isinstance(stack.encoder, PaddedEncoder):
        rows[:0] = _padded(config, stack.encoder)
    return rows


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


def _whole(config: Config, stack: Stack, world_size: int) -> list[Row]:
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
    if form == "nf4":
        largest = max(item.weight.numel() for item in _lora_linears(stack))
        rows.append(Row("a linear made full", largest * width, f"{largest:,} weights"))
    return rows


def _sharded(config: Config, stack: Stack, world_size: int) -> list[Row]:
    linears, others, trained = _sizes(stack)
    width = getattr(torch, config.model.dtype).itemsize
    world = World(rank=0, size=world_size, local_rank=0, device=torch.device("cuda"))
    zero = deepspeed_config(config, world, stack)["zero_optimization"]
    frozen, share = linears + others, f"1/{world_size} of"
    live = min(frozen, max(zero["stage3_max_live_parameters"], _largest_leaf(stack)))
    bucket = zero.get("reduce_bucket_size", 500_000_000)  # DeepSpeed's own default
    sizes, limit = map(torch.numel, _trained(stack)), zero["stage3_param_persistence_threshold"]
    whole = sum(size for size in sizes if size <= limit)
    slices = (frozen * width // world_size, ZERO_TRAINED * trained // world_size)
    return [
        Row("frozen weights", slices[0], f"{share} {frozen:,} weights"),
        Row("gathered weights", live * width, f"{live:,} weights live at most"),
        Row("trained", slices[1], f"{share} {trained:,} with their states"),
        Row("adapters kept whole", 4 * whole, f"{whole:,} below the persistence threshold"),
        Row("gradient bucket", 4 * bucket, f"{bucket:,} fp32 numbers: reduce_bucket_size"),
    ]


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
    linears = sum(item.weight.numel() for item in _lora_linears(stack))
    trained = sum(item.numel() for item in _trained(stack))
    return linears, sum(item.numel() for item in stack.parameters()) - linears - trained, trained


def _lora_linears(stack: Stack) -> list[LoraLinear]:
    return [item for item in stack.modules() if isinstance(item, LoraLinear)]


def _trained(stack: Stack) -> list[torch.nn.Parameter]:
    return [item for item in stack.parameters() if item.requires_grad]


def _largest_leaf(stack: Stack) -> int:
    return max(sum(math.prod(item.shape) for item in leaf.parameters()) for leaf in stack.leaves)
