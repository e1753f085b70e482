"""SwiGLU in C++ (csrc/cpu): one pass each way, nothing but the input is kept."""

import torch
from torch.autograd.function import once_differentiable

from mtllm_engine.kernels import native

from .checks import check_inputs

native.load("cpu")


def swiglu(gate_up_SF: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """activation(gate) * up, fp32 inside, half as wide as the tensor and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous, on the CPU: the gate's channels, then as many of
            the up-projection.
        activation: silu, or gelu_tanh as Gemma's.

    Raises:
        ValueError: There is no such activation, or the tensor is not contiguous, or of a wrong
            shape or dtype.

    Source: arXiv 2002.05202, eq. 5 and 6.
    """
    check_inputs(gate_up_SF, activation)
    return _SwiGlu.apply(gate_up_SF, activation)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_SF, activation):
        ctx.save_for_backward(gate_up_SF)
        ctx.is_gelu = activation == "gelu_tanh"
        return torch.ops.mtllm.swiglu_forward(gate_up_SF, ctx.is_gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        (gate_up_SF,) = ctx.saved_tensors
        backward = torch.ops.mtllm.swiglu_backward
        return backward(dy_SF.contiguous(), gate_up_SF, ctx.is_gelu), None
