"""The adapters' skinny products, each of which reads its large operand once for all adapters.

`lora_A_QD` stacks the group's A, each padded to R rows, to Q = adapters x R; `lora_B_FQ` holds
scale * B, an adapter's in its own rows and columns, zeros elsewhere. So low_SQ lora_B_FQ^T updates
the whole group, and zeros pad the ranks. Sums that are split into C parts, one to a program, are
added up in a fixed order: the same bits every time.

Products inside loops have fewer than 64 rows here, so that Triton does not take Hopper's
asynchronous ones (wgmma). These gain nothing where memory is the bound, and of a tile that one of
them reads, and something else too, Triton's pipeline (3.9) keeps a copy too few: the next tile is
loaded into the one that is still being multiplied.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.blocks import dot

from .dropout import Dropout, linear_hash
from .masks import HASHES, keep, row_hash

MAX_RANK = 64
MAX_ROWS = 32
MAX_ADAPTERS = len(HASHES)
PACK = 4096  # numbers of an adapter's matrix that a program takes at a time
# Two for each multiprocessor of an H100; a constant, for results depend on how sums are split
PROGRAMS = 264


class Group(NamedTuple):
    """Output channels [start, end) of each adapter, and their rank."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    rank: int

    @property
    def padded_rank(self) -> int:
        return max(16, triton.next_power_of_2(self.rank))

    @property
    def rows(self) -> int:
        """Of a product, which takes this many ranks at a time."""
        return min(self.padded_rank, MAX_ROWS)


def pack(
    group: Group,
    out_width: int,
    scale: float,
    matrices: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A_QD, lora_B_FQ) from A, B of each adapter in turn, rounded once to `dtype`.

    One launch, for all four linears of a layer do this in forward and in backward.
    """
    width, num_ranks = matrices[0].shape[1], len(group.starts) * group.padded_rank
    lora_A_QD = matrices[0].new_empty(num_ranks, width, dtype=dtype)
    lora_B_FQ = matrices[0].new_empty(out_width, num_ranks, dtype=dtype)
    missing = (None,) * (MAX_ADAPTERS - len(group.starts))
    block = PACK // group.padded_rank
    _pack[triton.cdiv(width, block) + triton.cdiv(out_width, block),](
        *matrices[::2], *missing, *matrices[1::2], *missing, lora_A_QD, lora_B_FQ, scale,
        WIDTH=width, OUT_WIDTH=out_width, STARTS=group.starts, ENDS=group.ends,
        RANK=group.rank, R=group.padded_rank, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return lora_A_QD, lora_B_FQ


def masks(dropout: Dropout | None) -> tuple[torch.Tensor | int | float | None, ...]:
    """A `Dropout` as kernels take it: of integers, for a tensor would be a copy to wait for."""
    if dropout is None:
        return None, *(0,) * MAX_ADAPTERS, 0, 1.0
    hashes = [linear_hash(linear) for linear in dropout.linears]
    hashes += [0] * (MAX_ADAPTERS - len(hashes))
    return dropout.seeds_S, *hashes, dropout.threshold, dropout.keep_scale


def low_activations(
    group: Group, x_SD: torch.Tensor, lora_A_QD: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """(S, Q) in x's dtype: drop_i(x) A_i^T for every adapter i, in one read of x."""
    num_tokens, width = x_SD.shape
    block_S, block_D = 64, 32 if x_SD.dtype == torch.float32 else 64
    blocks = triton.cdiv(num_tokens, block_S)
    chunk, splits = _split(width, block_D, blocks)
    dtype = x_SD.dtype if splits == 1 else torch.float32
    parts_CSQ = x_SD.new_empty(splits, num_tokens, len(lora_A_QD), dtype=dtype)
    _low_activations[blocks, splits](
        x_SD, lora_A_QD, *masks(dropout), parts_CSQ, num_tokens, chunk,
        WIDTH=width, ADAPTERS=len(group.starts), R=group.padded_rank, ROWS=group.rows,
        BLOCK_S=block_S, BLOCK_D=block_D, num_warps=4, num_stages=4,
    )  # fmt: skip
    return parts_CSQ[0] if splits == 1 else _sum_parts(parts_CSQ, (0,), x_SD.dtype)


def output_gradients(
    group: Group, dy_SF: torch.Tensor, low_SQ: torch.Tensor, lora_B_FQ: torch.Tensor, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(dlow_SQ in dy's dtype, fp32 dB of each adapter) in one read of the adapted channels of dy.

    A program holds dB of a slab of channels while it walks over tokens, and leaves its part of
    dlow behind.
    """
    (num_tokens, width), block_R = dy_SF.shape, group.padded_rank
    widths = [end - start for start, end in zip(group.starts, group.ends)]
    block_F = min(_slab(dy_SF.dtype, block_R), max(16, triton.next_power_of_2(max(widths))))
    firsts = (0, *itertools.accumulate(triton.cdiv(f, block_F) for f in widths))
    slabs, block_S = firsts[-1], 32
    chunk, splits = _split(num_tokens, block_S, slabs)
    dlow_parts_CSR = dy_SF.new_empty(slabs, num_tokens, block_R, dtype=torch.float32)
    dB_parts_CFR = dy_SF.new_empty(splits, slabs * block_F, block_R, dtype=torch.float32)
    _output_gradients[slabs, splits](
        dy_SF, low_SQ, lora_B_FQ, dlow_parts_CSR, dB_parts_CFR, num_tokens, chunk, scale,
        WIDTH=width, FIRSTS=firsts[:-1], STARTS=group.starts, ENDS=group.ends,
        R=block_R, ROWS=group.rows, BLOCK_S=block_S, BLOCK_F=block_F, num_warps=8, num_stages=3,
    )  # fmt: skip
    dB_FR = dB_parts_CFR.sum(0)[:, : group.rank]
    dBs = [dB_FR[first * block_F : first * block_F + f] for first, f in zip(firsts, widths)]
    return _sum_parts(dlow_parts_CSR, firsts[:-1], dy_SF.dtype), dBs


def input_gradients(
    group: Group, x_SD: torch.Tensor, dlow_SQ: torch.Tensor, dropout: Dropout | None
) -> list[torch.Tensor]:
    """fp32 dA of each adapter, dlow_i^T drop_i(x), in one read of x."""
    (num_tokens, width), num_ranks = x_SD.shape, dlow_SQ.shape[1]
    block_S, block_D = 32, 64 if x_SD.dtype == torch.float32 else 128
    blocks = triton.cdiv(width, block_D)
    chunk, splits = _split(num_tokens, block_S, blocks)
    parts_CQD = x_SD.new_empty(splits, num_ranks, width, dtype=torch.float32)
    _input_gradients[blocks, splits](
        x_SD, dlow_SQ, *masks(dropout), parts_CQD, num_tokens, chunk,
        WIDTH=width, ADAPTERS=len(group.starts), R=group.padded_rank, ROWS=group.rows,
        BLOCK_S=block_S, BLOCK_D=block_D, num_warps=8, num_stages=4,
    )  # fmt: skip
    dA_QD = parts_CQD.sum(0)
    return [dA_QD[first : first + group.rank] for first in range(0, num_ranks, group.padded_rank)]


def _slab(dtype: torch.dtype, block_R: int) -> int:
    """Channels whose dB fits the registers of 8 warps; the more, the fewer parts of dlow."""
    return 128 if dtype == torch.float32 else 512 if block_R <= 32 else 256


def _split(length: int, block: int, others: int) -> tuple[int, int]:
    """(how much of a sum a program takes, a multiple of `block`; in how many parts the sum is).

    Args:
        others: How many programs share the other axes.
    """
    steps = triton.cdiv(length, block)
    chunk = max(1, triton.cdiv(steps, max(1, PROGRAMS // max(1, others)))) * block
    return chunk, max(1, triton.cdiv(length, chunk))


def _sum_parts(
    parts_CSR: torch.Tensor, firsts: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """(S, len(firsts) * R): the sums of the parts from each of `firsts` to the next, side by side.

    Args:
        parts_CSR: Of the ranks of one adapter, or of all, which are one group then.
    """
    num_parts, num_rows, width = parts_CSR.shape
    out_SQ = parts_CSR.new_empty(num_rows, len(firsts) * width, dtype=dtype)
    _sum_parts_kernel[triton.cdiv(num_rows * width, 1024), len(firsts)](
        parts_CSR, out_SQ, num_parts, num_rows, FIRSTS=firsts, WIDTH=width, BLOCK=1024, num_warps=4
    )
    return out_SQ


@triton.jit
def _pack(
    a0_ptr, a1_ptr, a2_ptr, a3_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr,
    lora_a_ptr, lora_b_ptr, scale,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs take A's columns, the others B's rows, each for all adapters."""
    RANKS: tl.constexpr = len(STARTS) * R
    dtype: tl.constexpr = lora_a_ptr.dtype.element_ty
    a_ptrs, b_ptrs = (a0_ptr, a1_ptr, a2_ptr, a3_ptr), (b0_ptr, b1_ptr, b2_ptr, b3_ptr)
    ranks, block = tl.arange(0, R), tl.program_id(0)
    blocks_of_a = tl.cdiv(WIDTH, BLOCK)
    if block < blocks_of_a:
        channels = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        is_channel, offsets = channels < WIDTH, ranks[:, None] * WIDTH + channels
        for i in tl.static_range(len(STARTS)):
            a = tl.load(a_ptrs[i] + offsets, is_channel & (ranks < RANK)[:, None], other=0.0)
            tl.store(lora_a_ptr + i * R * WIDTH + offsets, a.to(dtype), is_channel)
    else:
        rows = ((block - blocks_of_a) * BLOCK + tl.arange(0, BLOCK))[:, None]
        for i in tl.static_range(len(STARTS)):
            is_own = (rows >= STARTS[i]) & (rows < ENDS[i]) & (ranks < RANK)[None, :]
            own_ptrs = b_ptrs[i] + (rows - STARTS[i]) * RANK + ranks[None, :]
            b = tl.load(own_ptrs, is_own, other=0.0).to(tl.float32) * scale
            lora_b_ptrs = lora_b_ptr + rows * RANKS + i * R + ranks[None, :]
            tl.store(lora_b_ptrs, b.to(dtype), rows < OUT_WIDTH)


@triton.jit(do_not_specialize=HASHES)
def _low_activations(
    x_ptr, a_ptr, seeds_ptr, hash0, hash1, hash2, hash3, threshold, keep_scale,
    low_ptr, num_rows, chunk,
    WIDTH: tl.constexpr, ADAPTERS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = ADAPTERS * R
    hashes = (hash0, hash1, hash2, hash3)
    first_row = tl.program_id(0) * BLOCK_S
    rows, ranks = tl.arange(0, BLOCK_S), tl.arange(0, ROWS)
    is_row = (first_row + rows < num_rows)[None, :]
    row_hashes = ()
    if seeds_ptr is not None:
        for i in tl.static_range(ADAPTERS):
            hash_S = row_hash(seeds_ptr, first_row + rows, num_rows, hashes[i])
            row_hashes = row_hashes + (hash_S[None, :],)
    x_ptr += tl.cast(first_row, tl.int64) * WIDTH
    lows = (tl.zeros([ROWS, BLOCK_S], tl.float32),) * (RANKS // ROWS)
    begin = tl.program_id(1) * chunk
    for first in range(begin, min(begin + chunk, WIDTH), BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + (rows[None, :] * WIDTH + channels[:, None])
        x = tl.load(x_ptrs, is_row & (channels < WIDTH)[:, None], other=0.0)
        a_ptrs, sums = a_ptr + (ranks[:, None] * WIDTH + channels[None, :]), ()
        for i in tl.static_range(ADAPTERS):
            kept = x
            if seeds_ptr is not None:
                is_kept = keep(row_hashes[i], channels[:, None], threshold)
                kept = tl.where(is_kept, x, tl.zeros_like(x))
            for j in tl.static_range(i * R // ROWS, (i + 1) * R // ROWS):
                a = tl.load(a_ptrs + j * ROWS * WIDTH, (channels < WIDTH)[None, :], other=0.0)
                sums = sums + (dot(a, kept, lows[j]),)
        lows = sums
    low_ptrs = low_ptr + (tl.program_id(1) * tl.cast(num_rows, tl.int64) + first_row) * RANKS
    for j in tl.static_range(RANKS // ROWS):
        low = (lows[j] * keep_scale).to(low_ptr.dtype.element_ty)
        tl.store(low_ptrs + rows[None, :] * RANKS + (j * ROWS + ranks)[:, None], low, is_row)


@triton.jit
def _output_gradients(
    dy_ptr, low_ptr, b_ptr, dlow_ptr, db_ptr, num_rows, chunk, scale,
    WIDTH: tl.constexpr, FIRSTS: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = len(STARTS) * R
    slab, slabs = tl.program_id(0), tl.num_programs(0)
    adapter, start, end = 0, STARTS[0] + slab * BLOCK_F, ENDS[0]
    for i in tl.static_range(1, len(STARTS)):
        later = slab >= FIRSTS[i]
        adapter = tl.where(later, i, adapter)
        start = tl.where(later, STARTS[i] + (slab - FIRSTS[i]) * BLOCK_F, start)
        end = tl.where(later, ENDS[i], end)
    channels, ranks, rows = tl.arange(0, BLOCK_F), tl.arange(0, R), tl.arange(0, BLOCK_S)
    is_channel = start + channels < end
    low_ptrs = low_ptr + adapter * R + rows[None, :] * RANKS + tl.arange(0, ROWS)[:, None]
    b_ptrs = b_ptr + start * RANKS + adapter * R + channels[:, None] * RANKS + ranks[None, :]
    b = tl.load(b_ptrs, is_channel[:, None], other=0.0)
    db = (tl.zeros([ROWS, BLOCK_F], tl.float32),) * (R // ROWS)
    begin = tl.program_id(1) * chunk
    for first in range(begin, min(begin + chunk, num_rows), BLOCK_S):
        first_64 = tl.cast(first, tl.int64)
        is_row = first + rows < num_rows
        dy_ptrs = dy_ptr + first_64 * WIDTH + start + rows[:, None] * WIDTH + channels[None, :]
        dy = tl.load(dy_ptrs, is_row[:, None] & is_channel[None, :], other=0.0)
        dlow = dot(dy, b, tl.zeros([BLOCK_S, R], tl.float32))
        dlow_ptrs = dlow_ptr + (slab * tl.cast(num_rows, tl.int64) + first_64) * R
        tl.store(dlow_ptrs + rows[:, None] * R + ranks[None, :], dlow, is_row[:, None])
        sums = ()
        for i in tl.static_range(R // ROWS):
            low = tl.load(low_ptrs + first_64 * RANKS + i * ROWS, is_row[None, :], other=0.0)
            sums = sums + (dot(low, dy, db[i]),)
        db = sums
    db_ptrs = db_ptr + (tl.program_id(1) * slabs + slab) * (BLOCK_F * R)
    for i in tl.static_range(R // ROWS):
        ranks = i * ROWS + tl.arange(0, ROWS)
        tl.store(db_ptrs + channels[None, :] * R + ranks[:, None], db[i] * scale)


@triton.jit(do_not_specialize=HASHES)
def _input_gradients(
    x_ptr, dlow_ptr, seeds_ptr, hash0, hash1, hash2, hash3, threshold, keep_scale,
    da_ptr, num_rows, chunk,
    WIDTH: tl.constexpr, ADAPTERS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = ADAPTERS * R
    hashes = (hash0, hash1, hash2, hash3)
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    rows, ranks = tl.arange(0, BLOCK_S), tl.arange(0, ROWS)
    da = (tl.zeros([ROWS, BLOCK_D], tl.float32),) * (RANKS // ROWS)
    begin = tl.program_id(1) * chunk
    for first in range(begin, min(begin + chunk, num_rows), BLOCK_S):
        first_64, is_row = tl.cast(first, tl.int64), first + rows < num_rows
        x_ptrs = x_ptr + first_64 * WIDTH + rows[:, None] * WIDTH + channels
        x = tl.load(x_ptrs, is_row[:, None] & (channels < WIDTH), other=0.0)
        sums = ()
        for i in tl.static_range(ADAPTERS):
            kept = x
            if seeds_ptr is not None:
                hash_S = row_hash(seeds_ptr, first + rows, num_rows, hashes[i])
                kept = tl.where(keep(hash_S[:, None], channels, threshold), x, tl.zeros_like(x))
            for j in tl.static_range(i * R // ROWS, (i + 1) * R // ROWS):
                dlow_ptrs = dlow_ptr + first_64 * RANKS + rows[None, :] * RANKS
                dlow_ptrs += (j * ROWS + ranks)[:, None]
                dlow = tl.load(dlow_ptrs, is_row[None, :], other=0.0)
                sums = sums + (dot(dlow, kept, da[j]),)
        da = sums
    da_ptrs = da_ptr + tl.program_id(1) * (RANKS * WIDTH) + ranks[:, None] * WIDTH + channels
    for j in tl.static_range(RANKS // ROWS):
        tl.store(da_ptrs + j * ROWS * WIDTH, da[j] * keep_scale, channels < WIDTH)


@triton.jit
def _sum_parts_kernel(
    parts_ptr, out_ptr, num_parts, num_rows,
    FIRSTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size, group = num_rows * WIDTH, tl.program_id(1)
    begin, end = 0, num_parts
    for i in tl.static_range(1, len(FIRSTS)):
        begin = tl.where(group >= i, FIRSTS[i], begin)
        end = tl.where(group == i - 1, FIRSTS[i], end)
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(begin, end):
        part_ptrs = parts_ptr + part * tl.cast(size, tl.int64) + elements
        total += tl.load(part_ptrs, elements < size, other=0.0)
    out = elements // WIDTH * (len(FIRSTS) * WIDTH) + group * WIDTH + elements % WIDTH
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), elements < size)
