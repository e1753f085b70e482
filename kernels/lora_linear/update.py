"""The adapters' part of an output or of dx, written for a base GEMM to add itself to.

Products have 64 rows or more, for which Triton takes Hopper's asynchronous ones (wgmma): nothing
but the product reads a tile here. Elsewhere that is not so, see low_rank.py.
"""

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.blocks import dot, tile_origin

from .dropout import Dropout
from .low_rank import Group, masks
from .masks import HASHES, keep, row_hash

GROUP_S = 8  # blocks of tokens that share the adapters' tiles


def update(
    low_SQ: torch.Tensor,
    lora: torch.Tensor,
    bias_F: torch.Tensor | None = None,
    added_SF: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """(S, F) in low's dtype: low lora^T + b + added, with fp32 sums, rounded once.

    Args:
        lora: (F, Q); `transposed`: (Q, F), for dx = dlow A.
        added_SF: Overwritten with the result.
    """
    (num_tokens, num_ranks), out_width = low_SQ.shape, lora.shape[transposed]
    y_SF = low_SQ.new_empty(num_tokens, out_width) if added_SF is None else added_SF
    tile = _tile(low_SQ.dtype, num_ranks)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_S"]) * triton.cdiv(out_width, tile["BLOCK_F"]),)
    _update[grid](
        low_SQ, lora, bias_F, added_SF, y_SF, num_tokens,
        RANKS=num_ranks, OUT_WIDTH=out_width, TRANSPOSED=transposed, GROUP_S=GROUP_S, **tile,
    )  # fmt: skip
    return y_SF


def masked_update(
    group: Group, dlow_SQ: torch.Tensor, lora_A_QD: torch.Tensor, dropout: Dropout
) -> torch.Tensor:
    """(S, D) in dlow's dtype: the adapters' part of dx, the sum of drop_i(dlow_i A_i)."""
    num_tokens, width, block_S, block_D = len(dlow_SQ), lora_A_QD.shape[1], 64, 128
    dx_SD = dlow_SQ.new_empty(num_tokens, width)
    _masked_update[triton.cdiv(width, block_D), triton.cdiv(num_tokens, block_S)](
        dlow_SQ, lora_A_QD, *masks(dropout), dx_SD, num_tokens,
        WIDTH=width, ADAPTERS=len(group.starts), R=group.padded_rank,
        BLOCK_S=block_S, BLOCK_D=block_D, num_warps=8,
    )  # fmt: skip
    return dx_SD


def _tile(dtype: torch.dtype, num_ranks: int) -> dict[str, int]:
    """The largest tiles that accumulators in registers allow."""
    block_Q = min(64, triton.next_power_of_2(num_ranks))
    if dtype == torch.float32:
        sizes = {"BLOCK_S": 64, "BLOCK_F": 64, "BLOCK_Q": min(32, block_Q)}
        return {**sizes, "num_warps": 4, "num_stages": 2}
    sizes = {"BLOCK_S": 128, "BLOCK_F": 128, "BLOCK_Q": block_Q}
    return {**sizes, "num_warps": 8, "num_stages": 3}


@triton.jit
def _update(
    low_ptr, lora_ptr, bias_ptr, added_ptr, y_ptr, num_rows,
    RANKS: tl.constexpr, OUT_WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, GROUP_S: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    first_row, first_channel = tile_origin(num_rows, OUT_WIDTH, GROUP_S, BLOCK_S, BLOCK_F)
    rows, channels = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_F)
    is_row = (first_row + rows < num_rows)[:, None]
    is_channel = (first_channel + channels < OUT_WIDTH)[None, :]
    row_64, channel_64 = tl.cast(first_row, tl.int64), tl.cast(first_channel, tl.int64)
    y = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for step in range((RANKS + BLOCK_Q - 1) // BLOCK_Q):
        first = step * BLOCK_Q
        ranks = tl.arange(0, BLOCK_Q)
        low_ptrs = low_ptr + row_64 * RANKS + first + rows[:, None] * RANKS + ranks[None, :]
        low = tl.load(low_ptrs, is_row & (first + ranks < RANKS)[None, :], other=0.0)
        if TRANSPOSED:
            lora_ptrs = lora_ptr + tl.cast(first, tl.int64) * OUT_WIDTH + first_channel
            lora_ptrs += ranks[:, None] * OUT_WIDTH + channels[None, :]
        else:
            lora_ptrs = lora_ptr + channel_64 * RANKS + first + channels[None, :] * RANKS
            lora_ptrs += ranks[:, None]
        lora = tl.load(lora_ptrs, is_channel & (first + ranks < RANKS)[:, None], other=0.0)
        y = dot(low, lora, y)
    y_offsets = row_64 * OUT_WIDTH + first_channel + rows[:, None] * OUT_WIDTH + channels[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_channel + channels[None, :], is_channel, other=0.0)
        y += bias.to(tl.float32)
    if added_ptr is not None:
        y += tl.load(added_ptr + y_offsets, is_row & is_channel, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), is_row & is_channel)


@triton.jit(do_not_specialize=HASHES)
def _masked_update(
    dlow_ptr, a_ptr, seeds_ptr, hash0, hash1, hash2, hash3, threshold, keep_scale, dx_ptr, num_rows,
    WIDTH: tl.constexpr, ADAPTERS: tl.constexpr, R: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = ADAPTERS * R
    hashes = (hash0, hash1, hash2, hash3)
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first_row = tl.program_id(1) * BLOCK_S
    rows, ranks, first_64 = tl.arange(0, BLOCK_S), tl.arange(0, R), tl.cast(first_row, tl.int64)
    is_row = (first_row + rows < num_rows)[:, None]
    zeros = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dx = zeros
    for i in tl.static_range(ADAPTERS):
        dlow_ptrs = dlow_ptr + (first_64 * ADAPTERS + i) * R + rows[:, None] * RANKS
        dlow_ptrs += ranks[None, :]
        a_ptrs = a_ptr + (i * R + ranks)[:, None] * WIDTH + channels
        dlow = tl.load(dlow_ptrs, is_row, other=0.0)
        change = dot(dlow, tl.load(a_ptrs, channels < WIDTH, other=0.0), zeros)
        hash_S = row_hash(seeds_ptr, first_row + rows, num_rows, hashes[i])
        dx += tl.where(keep(hash_S[:, None], channels, threshold), change, 0.0)
    dx_ptrs = dx_ptr + first_64 * WIDTH + rows[:, None] * WIDTH + channels
    tl.store(dx_ptrs, (dx * keep_scale).to(dx_ptr.dtype.element_ty), is_row & (channels < WIDTH))
