"""Rotary embedding in place on the packed q/k/v, in one launch; values are never touched."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs

TILE = 1024  # channel pairs a step of a program
MAX_HALF = TILE
NUM_WARPS = 4  # 8 pairs a thread: two 16-byte loads


def rope(
    heads_SXK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int
) -> torch.Tensor:
    """Rotates channel pairs (k, k + K/2) of the first `num_rotated` heads, fp32 inside.

    Args:
        heads_SXK: fp32, bf16 or fp16, contiguous, K even and at most 2 * MAX_HALF. Overwritten:
            from here on only the result may be used, the argument holds the same memory without the
            rotation's gradient.
        cos_Sk: fp32, contiguous, one row a token, K/2 wide.
        sin_Sk: Like cos.
        num_rotated: From 0 to X; later heads stay as they are.

    Returns:
        The argument's memory, as a tensor with its own gradient.

    Raises:
        ValueError: An argument is not contiguous, on another device, of a wrong shape or dtype, or
            out of range.

    Source: arXiv 2104.09864, eq. 34.
    """
    check_inputs(heads_SXK, cos_Sk, sin_Sk, num_rotated, max_width=2 * MAX_HALF)
    return _Rope.apply(heads_SXK, cos_Sk, sin_Sk, num_rotated)


class _Rope(torch.autograd.Function):
    """An alias comes out, not the argument by `mark_dirty`.

    That is a view of the linear's output, and autograd would wrap a marked view's backward in
    copies of its whole base's gradient. The version still tells whoever saved the old values.
    Backward writes a new tensor, for others may hold the gradient that comes in.
    """

    @staticmethod
    def forward(ctx, heads_SXK, cos_Sk, sin_Sk, num_rotated):
        rotated = {"num_rotated": num_rotated, "num_written": num_rotated}
        _launch(heads_SXK, heads_SXK, cos_Sk, sin_Sk, **rotated, sign=1)
        torch.autograd.graph.increment_version(heads_SXK)
        ctx.save_for_backward(cos_Sk, sin_Sk)
        ctx.num_rotated = num_rotated
        return heads_SXK.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dturned_SXK):
        dturned_SXK = dturned_SXK.contiguous()
        dheads_SXK = torch.empty_like(dturned_SXK)
        rotated = {"num_rotated": ctx.num_rotated, "num_written": dturned_SXK.shape[1]}
        _launch(dturned_SXK, dheads_SXK, *ctx.saved_tensors, **rotated, sign=-1)
        return dheads_SXK, None, None, None


def _launch(
    source_SXK: torch.Tensor,
    out_SXK: torch.Tensor,
    cos_Sk: torch.Tensor,
    sin_Sk: torch.Tensor,
    *,
    num_rotated: int,
    num_written: int,
    sign: int,
) -> None:
    tokens, num_heads, width = source_SXK.shape
    block = triton.next_power_of_2(width // 2)
    _rope[(tokens,)](
        source_SXK, out_SXK, cos_Sk, sin_Sk, num_heads, num_rotated, num_written,
        SIGN=sign, HALF=width // 2, BLOCK_X=TILE // block, BLOCK_k=block, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _rope(
    source_ptr, out_ptr, cos_ptr, sin_ptr, num_heads, num_rotated, num_written,
    SIGN: tl.constexpr, HALF: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_k: tl.constexpr,
):  # fmt: skip
    """One token; out may be source.

    For a thread owns its pairs alone: a tile is never smaller than the program.
    """
    token = tl.cast(tl.program_id(0), tl.int64)
    channels = tl.arange(0, BLOCK_k)[None, :]
    inside = channels < HALF
    cos = tl.load(cos_ptr + token * HALF + channels, inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + channels, inside, other=0.0).to(tl.float32) * SIGN
    first = token * num_heads * (2 * HALF)
    for start in range(0, num_written, BLOCK_X):
        heads = start + tl.arange(0, BLOCK_X)[:, None]
        mask = (heads < num_written) & inside
        offsets = first + heads * (2 * HALF) + channels
        left = tl.load(source_ptr + offsets, mask, other=0.0).to(tl.float32)
        right = tl.load(source_ptr + offsets + HALF, mask, other=0.0).to(tl.float32)
        is_turned = heads < num_rotated
        new_left = tl.where(is_turned, left * cos - right * sin, left)
        tl.store(out_ptr + offsets, new_left.to(out_ptr.dtype.element_ty), mask)
        new_right = tl.where(is_turned, right * cos + left * sin, right)
        tl.store(out_ptr + offsets + HALF, new_right.to(out_ptr.dtype.element_ty), mask)
