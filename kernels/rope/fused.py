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
    """Rotates channel pairs (i, i + k) of the first `num_rotated` heads, fp32 inside.

    Backward is the transposed matrix, sin with the other sign: right whatever factor both carry.

    Args:
        heads_SXK: fp32, bf16 or fp16, contiguous, K even and at most 2 * MAX_HALF. Overwritten:
            from here on only the result may be used, the argument holds the same memory without the
            rotation's gradient.
        cos_Sk: fp32, contiguous, one row a token, up to K/2 wide; channels from 2k on stay as they
            are.
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
        written = {"num_written": num_rotated, "half_written": cos_Sk.shape[1]}
        _launch(heads_SXK, heads_SXK, cos_Sk, sin_Sk, num_rotated, **written, sign=1)
        torch.autograd.graph.increment_version(heads_SXK)
        ctx.save_for_backward(cos_Sk, sin_Sk)
        ctx.num_rotated = num_rotated
        return heads_SXK.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dturned_SXK):
        dturned_SXK = dturned_SXK.contiguous()
        dheads_SXK = torch.empty_like(dturned_SXK)
        _, num_heads, width = dturned_SXK.shape
        written = {"num_written": num_heads, "half_written": width // 2}
        _launch(dturned_SXK, dheads_SXK, *ctx.saved_tensors, ctx.num_rotated, **written, sign=-1)
        return dheads_SXK, None, None, None


def _launch(
    source_SXK: torch.Tensor,
    out_SXK: torch.Tensor,
    cos_Sk: torch.Tensor,
    sin_Sk: torch.Tensor,
    num_rotated: int,
    *,
    num_written: int,
    half_written: int,
    sign: int,
) -> None:
    """Args: half_written: Half of the channels that out gets, from 0 on where they are in pairs."""
    tokens, num_heads, width = source_SXK.shape
    block = triton.next_power_of_2(half_written)
    _rope[(tokens,)](
        source_SXK, out_SXK, cos_Sk, sin_Sk, num_heads, num_rotated, num_written,
        SIGN=sign, WIDTH=width, PAIRS=cos_Sk.shape[1], HALF_WRITTEN=half_written,
        BLOCK_X=TILE // block, BLOCK_k=block, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _rope(
    source_ptr, out_ptr, cos_ptr, sin_ptr, num_heads, num_rotated, num_written,
    SIGN: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, HALF_WRITTEN: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_k: tl.constexpr,
):  # fmt: skip
    """One token; out may be source.

    For a thread owns its pairs alone: a tile is never smaller than the program. Channels that do
    not turn are pairs as well, left and right halves of what there is of them.
    """
    token = tl.cast(tl.program_id(0), tl.int64)
    pair = tl.arange(0, BLOCK_k)[None, :]
    inside, has_angle = pair < HALF_WRITTEN, pair < PAIRS
    cos = tl.load(cos_ptr + token * PAIRS + pair, has_angle, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * PAIRS + pair, has_angle, other=0.0).to(tl.float32) * SIGN
    first = token * num_heads * WIDTH
    for start in range(0, num_written, BLOCK_X):
        heads = start + tl.arange(0, BLOCK_X)[:, None]
        mask = (heads < num_written) & inside
        lefts, is_turned = first + heads * WIDTH + pair, heads < num_rotated
        rights = lefts + PAIRS
        if HALF_WRITTEN > PAIRS:
            lefts = tl.where(has_angle, lefts, lefts + PAIRS)
            rights = tl.where(has_angle, rights, rights - PAIRS + HALF_WRITTEN)
            is_turned = is_turned & has_angle
        left = tl.load(source_ptr + lefts, mask, other=0.0).to(tl.float32)
        right = tl.load(source_ptr + rights, mask, other=0.0).to(tl.float32)
        new_left = tl.where(is_turned, left * cos - right * sin, left)
        tl.store(out_ptr + lefts, new_left.to(out_ptr.dtype.element_ty), mask)
        new_right = tl.where(is_turned, right * cos + left * sin, right)
        tl.store(out_ptr + rights, new_right.to(out_ptr.dtype.element_ty), mask)
