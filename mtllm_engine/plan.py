"""What a run needs, before it is queued: the memory of one GPU, line by line. An estimate: nothing here is measured.

Sizes come from the stack itself, built on the meta device, and from the DeepSpeed configuration that training uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, M2M100Config

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.engine import deepspeed_config
from mtllm_engine.kernels.lora_linear.quantised import BYTES
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.model.mtllm import Stack
from mtllm_engine.world import World

PLAIN_TRAINED = 16  # bytes of a trained number in fp32: value, gradient, two moments
ZERO_TRAINED = 24  # under ZeRO-3, of this rank's share: its slice, the optimizer's, two of gradients, two moments
ASSUMED = 2 << 30  # CUDA's context, NCCL, workspaces of libraries, and what fragmentation of the allocator costs


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the estimate, of one GPU."""

    name: str
    bytes: int
    how: str  # in words


def memory(config: Config, encoder: M2M100Config, decoder: LlamaConfig, world_size: int) -> list[Row]:
    """What the backward of the longest micro-batch finds in a GPU's memory; there are no logits in this method."""
    with torch.device("meta"):
        stack = Stack(config, encoder, decoder)
    held = _sharded if config.zero.stage == 3 else _whole
    return [*held(config, stack, world_size), *_states(config, encoder, decoder)]


def total(rows: Sequence[Row]) -> int:
    return sum(row.bytes for row in rows)


def saved_bytes(decoder: LlamaConfig, lora: LoraConfig, dtype: torch.dtype, activations: str) -> int:
    """What autograd keeps of one student token in one decoder layer, every linear adapted, by the CUDA implementations.

    The layer's input; unless all is recomputed, also the state between attention and MLP, q and the attention's output,
    k and v, adapters' low-rank activations and the softmax's fp32 sums; with "save", gate and up too.
    """
    if activations == "recompute":
        return decoder.hidden_size * dtype.itemsize
    heads_width = decoder.num_attention_heads * decoder.head_dim
    kv_width = decoder.num_key_value_heads * decoder.head_dim
    wide = 2 * decoder.hidden_size + 2 * heads_width + 2 * kv_width
    wide += 2 * decoder.intermediate_size if activations == "save" else 0
    padded_rank = max(16, 1 << (lora.rank - 1).bit_length())
    return (wide + len(lora.targets) * padded_rank) * dtype.itemsize + 4 * decoder.num_attention_heads


def _whole(config: Config, stack: Stack, world_size: int) -> list[Row]:
    linears, others, trained = _sizes(stack)
    width = getattr(torch, config.model.dtype).itemsize
    base = config.model.base
    rows = [
        Row(name="LLM's linears", bytes=int(linears * BYTES.get(base, width)), how=f"{linears:,} weights, {base}"),
        Row(name="other frozen weights", bytes=others * width, how=f"{others:,} weights: encoder, embeddings, norms"),
        Row(name="trained", bytes=PLAIN_TRAINED * trained, how=f"{trained:,} in fp32, gradients, two moments"),
    ]
    if base == "nf4":
        largest = max(item.weight.numel() for item in stack.modules() if isinstance(item, LoraLinear))
        rows.append(Row(name="a linear made full", bytes=largest * width, how=f"{largest:,} weights"))
    return rows


def _sharded(config: Config, stack: Stack, world_size: int) -> list[Row]:
    linears, others, trained = _sizes(stack)
    width = getattr(torch, config.model.dtype).itemsize
    world = World(rank=0, size=world_size, local_rank=0, device=torch.device("cuda"))
    zero = deepspeed_config(config, world, stack)["zero_optimization"]
    frozen, share = linears + others, f"1/{world_size} of"
    live = min(frozen, max(zero["stage3_max_live_parameters"], _largest_leaf(stack)))
    bucket = zero.get("reduce_bucket_size", 500_000_000)  # DeepSpeed's own default
    persistent = sum(
        item.numel() for item in _trained(stack) if item.numel() <= zero["stage3_param_persistence_threshold"]
    )
    return [
        Row(name="frozen weights", bytes=frozen * width // world_size, how=f"{share} {frozen:,} weights"),
        Row(name="gathered weights", bytes=live * width, how=f"{live:,} weights live at most"),
        Row(name="trained", bytes=ZERO_TRAINED * trained // world_size, how=f"{share} {trained:,} with their states"),
        Row(name="adapters kept whole", bytes=4 * persistent, how=f"{persistent:,} below the persistence threshold"),
        Row(name="gradient bucket", bytes=4 * bucket, how=f"{bucket:,} fp32 numbers: reduce_bucket_size"),
    ]


def _states(config: Config, encoder: M2M100Config, decoder: LlamaConfig) -> list[Row]:
    """What grows with memory.max_tokens. In a layer's backward its gradients are live beside what was saved."""
    dtype, tokens, layers = getattr(torch, config.model.dtype), config.memory.max_tokens, decoder.num_hidden_layers
    width, inner = decoder.hidden_size, decoder.intermediate_size
    layer, whole = (saved_bytes(decoder, config.lora, dtype, kind) for kind in (config.memory.activations, "save"))
    states = (4 * width + 2 * encoder.d_model) * dtype.itemsize
    saved, how = layers * layer, f"{layers} layers x {layer / 1024:.1f} KiB"
    if layer < whole:  # backward makes what is missing of one layer at a time
        saved, how = saved + whole - layer, f"{how} + {(whole - layer) / 1024:.1f} KiB"
    working = (4 * inner + 4 * width) * dtype.itemsize
    if config.model.base == "fp8":
        working += 2 * inner * (2 * dtype.itemsize + 1)  # the widest gradient, scaled twice and rounded
    return [
        Row(name="saved activations", bytes=tokens * saved, how=f"{tokens:,} student tokens x ({how})"),
        Row(name="a layer's gradients", bytes=tokens * working, how=f"{tokens:,} tokens x {working / 1024:.0f} KiB"),
        Row(
            name="other states", bytes=tokens * states, how=f"{tokens:,} tokens x {states / 1024:.0f} KiB: both streams"
        ),
        Row(name="assumed", bytes=ASSUMED, how="CUDA, NCCL, workspaces, fragmentation"),
    ]


def _sizes(stack: Stack) -> tuple[int, int, int]:
    """Numbers of weights: the LLM's linears, all else that is frozen, what is trained."""
    linears = sum(item.weight.numel() for item in stack.modules() if isinstance(item, LoraLinear))
    trained = sum(item.numel() for item in _trained(stack))
    return linears, sum(item.numel() for item in stack.parameters()) - linears - trained, trained


def _trained(stack: Stack) -> list[torch.nn.Parameter]:
    return [item for item in stack.parameters() if item.requires_grad]


def _largest_leaf(stack: Stack) -> int:
    return max(sum(math.prod(item.shape) for item in leaf.parameters()) for leaf in stack.leaves)
