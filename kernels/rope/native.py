"""Rotary embedding in place on the packed q/k/v, in C++ (csrc/cpu); values are never touched."""

import torch
from torch.autograd.function import once_differentiable

from mtllm_engine.kernels import native

from .checks import check_inputs

native.load("cpu")


def rope(
    heads_SXK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int
) -> torch.Tensor:
    """Rotates channel pairs (i, i + k) of the first `num_rotated` heads, fp32 inside.

    Backward is the transposed matrix, sin with the other sign: right whatever factor both carry.

    Args:
        heads_SXK: fp32, bf16 or fp16, contiguous, on the CPU, K even. Overwritten: from here on
            only the result may be used, the argument holds the same memory without the rotation's
            gradient.
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
    check_inputs(heads_SXK, cos_Sk, sin_Sk, num_rotated)
    return _Rope.apply(heads_SXK, cos_Sk, sin_Sk, num_rotated)


class _Rope(torch.autograd.Function):
    """An alias, not `mark_dirty`, and a new tensor in backward: why, rope/fused.py says."""

    @staticmethod
    def forward(ctx, heads_SXK, cos_Sk, sin_Sk, num_rotated):
        turned_SXK = heads_SXK.detach()
        torch.ops.mtllm.rope(turned_SXK, turned_SXK, cos_Sk, sin_Sk, num_rotated, False)
        ctx.save_for_backward(cos_Sk, sin_Sk)
        ctx.num_rotated = num_rotated
        return turned_SXK

    @staticmethod
    @once_differentiable
    def backward(ctx, dturned_SXK):
        dturned_SXK = dturned_SXK.contiguous()
        dheads_SXK = torch.empty_like(dturned_SXK)
        torch.ops.mtllm.rope(dturned_SXK, dheads_SXK, *ctx.saved_tensors, ctx.num_rotated, True)
        return dheads_SXK, None, None, None
