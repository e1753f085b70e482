"""A GEMM that takes the adapters' update along: the low-rank product is summed into the same accumulators."""

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.blocks import dot, place

GROUP_S = 8  # blocks of tokens that share the weight's tiles


def matmul(
    x_SK: torch.Tensor,
    weight: torch.Tensor,
    bias_F: torch.Tensor | None = None,
    low_SQ: torch.Tensor | None = None,
    lora: torch.Tensor | None = None,
    added_SF: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """(S, F) in x's dtype: x weight^T + b + low lora^T + added, with fp32 sums, rounded once.

    Args:
        weight: (F, K), as is `lora` (F, Q); `transposed`: (K, F) and (Q, F), for dx = dy W + dlow A.
        added_SF: Overwritten with the result.
    """
    (num_tokens, width), out_width = x_SK.shape, weight.shape[transposed]
    y_SF = x_SK.new_empty(num_tokens, out_width) if added_SF is None else added_SF
    tile = _tile(x_SK.dtype, width)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_S"]) * triton.cdiv(out_width, tile["BLOCK_F"]),)
    _gemm[grid](
        x_SK, weight, bias_F, low_SQ, lora, added_SF, y_SF, num_tokens,
        WIDTH=width, OUT_WIDTH=out_width, RANKS=0 if low_SQ is None else low_SQ.shape[1],
        TRANSPOSED=transposed, GROUP_S=GROUP_S, **tile,
    )  # fmt: skip
    return y_SF


def _tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    """The largest tiles that accumulators in registers allow; where K is a rank, small ones that only write."""
    block_K = min(64, max(16, triton.next_power_of_2(width)))
    if dtype == torch.float32:
        return {"BLOCK_S": 64, "BLOCK_F": 64, "BLOCK_K": min(32, block_K), "num_warps": 4, "num_stages": 2}
    block_F = 256 if width > 256 else 128
    return {"BLOCK_S": 128, "BLOCK_F": block_F, "BLOCK_K": block_K, "num_warps": 8, "num_stages": 3}


@triton.jit
def _gemm(
    x_ptr, w_ptr, bias_ptr, low_ptr, lora_ptr, added_ptr, y_ptr, num_rows,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, RANKS: tl.constexpr, TRANSPOSED: tl.constexpr,
    GROUP_S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, first_channel = place(num_rows, OUT_WIDTH, GROUP_S, BLOCK_S, BLOCK_F)
    rows, channels = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_F)
    is_row, is_channel = (first_row + rows < num_rows)[:, None], (first_channel + channels < OUT_WIDTH)[None, :]
    row_64, channel_64 = tl.cast(first_row, tl.int64), tl.cast(first_channel, tl.int64)
    y = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    steps: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    low_steps: tl.constexpr = (RANKS + BLOCK_K - 1) // BLOCK_K
    for step in range(steps + low_steps):
        left_ptr, right_ptr, width, first = x_ptr, w_ptr, WIDTH, step * BLOCK_K
        if low_steps > 0:  # [x low] [w lora]^T, side by side here and nowhere else
            is_low = step >= steps
            left_ptr, right_ptr = tl.where(is_low, low_ptr, x_ptr), tl.where(is_low, lora_ptr, w_ptr)
            width, first = tl.where(is_low, RANKS, WIDTH), first - tl.where(is_low, steps * BLOCK_K, 0)
        k = tl.arange(0, BLOCK_K)
        left_ptrs = left_ptr + row_64 * width + first + rows[:, None] * width + k[None, :]
        left = tl.load(left_ptrs, is_row & (first + k < width)[None, :], other=0.0)
        if TRANSPOSED:
            right_ptrs = right_ptr + tl.cast(first, tl.int64) * OUT_WIDTH + first_channel
            right_ptrs += k[:, None] * OUT_WIDTH + channels[None, :]
        else:
            right_ptrs = right_ptr + channel_64 * width + first + channels[None, :] * width + k[:, None]
        right = tl.load(right_ptrs, is_channel & (first + k < width)[:, None], other=0.0)
        y = dot(left, right, y)
    y_offsets = row_64 * OUT_WIDTH + first_channel + rows[:, None] * OUT_WIDTH + channels[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_channel + channels[None, :], is_channel, other=0.0).to(tl.float32)
    if added_ptr is not None:
        y += tl.load(added_ptr + y_offsets, is_row & is_channel, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), is_row & is_channel)
