"""Rotary embedding in place on the packed q/k/v: queries and keys in one launch, values never touched."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs

TILE = 1024  # channel pairs a step of a program
MAX_HALF = TILE
NUM_WARPS = 4  # 8 pairs a thread: two 16-byte loads


def rope(heads_SHK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int) -> torch.Tensor:
    """Rotates channel pairs (k, k + K/2) of the first `num_rotated` heads, fp32 inside.

    Args:
        heads_SHK: fp32, bf16 or fp16, contiguous, K even and at most 2 * MAX_HALF. Overwritten: from here on only the
            result may be used, the argument holds the same memory without the rotation's gradient.
        cos_Sk: fp32, contiguous, one row a token, K/2 wide.
        sin_Sk: Like cos.
        num_rotated: From 0 to H; later heads stay as they are.

    Returns:
        The argument's memory, as a tensor with its own gradient.

    Raises:
        ValueError: An argument is not contiguous, on another device, of a wrong shape or dtype, or out of range.

    Source: arXiv 2104.09864, eq. 34.
    """
    check_inputs(heads_SHK, cos_Sk, sin_Sk, num_rotated, max_width=2 * MAX_HALF)
    return _Rope.apply(heads_SHK, cos_Sk, sin_Sk, num_rotated)


class _Rope(torch.autograd.Function):
    """Not `mark_dirty`: the argument is a view of the linear's output, and autograd would wrap a marked view's backward
    in copies of its whole base's gradient. An alias comes out instead; the version still tells whoever saved the old
    values. Backward writes a new tensor, for others may hold the gradient that comes in.
    """

    @staticmethod
    def forward(ctx, heads_SHK, cos_Sk, sin_Sk, num_rotated):
        _launch(heads_SHK, heads_SHK, cos_Sk, sin_Sk, num_rotated, num_written=num_rotated, sign=1)
        torch.autograd.graph.increment_version(heads_SHK)
        ctx.save_for_backward(cos_Sk, sin_Sk)
        ctx.num_rotated = num_rotated
        return heads_SHK.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dturned_SHK):
        dturned_SHK = dturned_SHK.contiguous()
        dheads_SHK = torch.empty_like(dturned_SHK)
        num_heads = dturned_SHK.shape[1]
        _launch(dturned_SHK, dheads_SHK, *ctx.saved_tensors, ctx.num_rotated, num_written=num_heads, sign=-1)
        return dheads_SHK, None, None, None


def _launch(
    source_SHK: torch.Tensor,
    out_SHK: torch.Tensor,
    cos_Sk: torch.Tensor,
    sin_Sk: torch.Tensor,
    num_rotated: int,
    *,
    num_written: int,
    sign: int,
) -> None:
    tokens, num_heads, width = source_SHK.shape
    block = triton.next_power_of_2(width // 2)
    _rope[(tokens,)](
        source_SHK, out_SHK, cos_Sk, sin_Sk, num_heads, num_rotated, num_written,
        SIGN=sign, HALF=width // 2, BLOCK_H=TILE // block, BLOCK_K=block, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _rope(
    source_ptr, out_ptr, cos_ptr, sin_ptr, num_heads, num_rotated, num_written, SIGN: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token. A thread owns its pairs alone (a tile is never smaller than the program), so out may be source."""
    token = tl.cast(tl.program_id(0), tl.int64)
    channels = tl.arange(0, BLOCK_K)[None, :]
    inside = channels < HALF
    cos = tl.load(cos_ptr + token * HALF + channels, inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + channels, inside, other=0.0).to(tl.float32) * SIGN
    first = token * num_heads * (2 * HALF)
    for start in range(0, num_written, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < num_written) & inside
        offsets = first + heads * (2 * HALF) + channels
        left = tl.load(source_ptr + offsets, mask, other=0.0).to(tl.float32)
        right = tl.load(source_ptr + offsets + HALF, mask, other=0.0).to(tl.float32)
        turned = heads < num_rotated
        tl.store(out_ptr + offsets, tl.where(turned, left * cos - right * sin, left).to(out_ptr.dtype.element_ty), mask)
        tl.store(
            out_ptr + offsets + HALF,
            tl.where(turned, right * cos + left * sin, right).to(out_ptr.dtype.element_ty),
            mask,
        )
