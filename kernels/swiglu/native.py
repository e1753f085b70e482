"""SwiGLU in C++ (csrc/cpu): one pass each way, nothing but the input is kept.

An update is added before, in fp32: on a CPU no linear leaves one.
"""

import torch
from mtllm_engine.kernels.contract import Update
from torch.autograd.function import once_differentiable

from mtllm_engine.kernels import native

from .checks import check_inputs

native.load("cpu")


def swiglu(
    gate_up_SF: torch.Tensor, activation: str = "silu", update: Update | None = None
) -> torch.Tensor:
    """activation(gate) * up, fp32 inside, half as wide as the tensor and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous, on the CPU: the gate's channels, then as many of
            the up-projection.
        activation: silu, or gelu_tanh as Gemma's.
        update: Contiguous and like gate_up, to which its product is added first. Gets no gradient;
            gate_up's is that of the sum.

    Raises:
        ValueError: There is no such activation, or the tensor is not contiguous, or of a wrong
            shape or dtype.

    Source: arXiv 2002.05202, eq. 5 and 6.
    """
    check_inputs(gate_up_SF, activation, update)
    if update is None:
        return _SwiGlu.apply(gate_up_SF, activation)
    low_SQ, lora_B_FQ = (each.detach().float() for each in update)
    sums_SF = torch.addmm(gate_up_SF.float(), low_SQ, lora_B_FQ.T)
    return _SwiGlu.apply(sums_SF, activation).to(gate_up_SF.dtype)


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
