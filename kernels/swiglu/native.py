"""SwiGLU in C++ (csrc/cpu): one pass each way, nothing but the input is kept."""

import torch
from torch.autograd.function import once_differentiable

from mtllm_engine.kernels import native

from .checks import check_inputs

native.load("cpu")


def swiglu(gate_up_SF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, fp32 inside, half as wide as the argument and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous, on the CPU: the gate's channels, then as many of
            the up-projection.

    Raises:
        ValueError: The argument is not contiguous, or of a wrong shape or dtype.

    Source: arXiv 2002.05202, eq. 5.
    """
    check_inputs(gate_up_SF)
    return _SwiGlu.apply(gate_up_SF)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_SF):
        ctx.save_for_backward(gate_up_SF)
        return torch.ops.mtllm.swiglu_forward(gate_up_SF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        return torch.ops.mtllm.swiglu_backward(dy_SF.contiguous(), *ctx.saved_tensors)
