"""RMSNorm with the residual's addition in C++ (csrc/cpu): each row is read once each way."""

import torch
from torch.autograd.function import once_differentiable

from mtllm_engine.kernels import native

from .checks import check_inputs

native.load("cpu")


def rms_norm(
    x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_SD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h): h = x + residual, rounded to x's dtype, and its RMSNorm y.

    Without a residual h is x itself, not a copy. For backward it keeps h and the weight, neither of
    them copied, and 1 / rms in fp32 (S,).

    Args:
        x_SD: fp32, bf16 or fp16, contiguous, on the CPU.
        weight_D: fp32, and then y is rounded once, or another of these dtypes, and then it and the
            normalised value are rounded to x's before they are multiplied. Frozen; never gets a
            gradient.
        residual_SD: Like x.

    Raises:
        ValueError: An argument is not contiguous, on another device, or of a wrong shape or dtype.

    Source: arXiv 1910.07467, eq. 4.
    """
    check_inputs(x_SD, weight_D, residual_SD)
    if residual_SD is None:
        return _RmsNorm.apply(x_SD, weight_D, eps, None), x_SD
    return _RmsNorm.apply(x_SD, weight_D, eps, residual_SD)


class _RmsNorm(torch.autograd.Function):
    """y, or with a residual (y, h)."""

    @staticmethod
    def forward(ctx, x_SD, weight_D, eps, residual_SD):
        forward, weight32_D = torch.ops.mtllm.rms_norm_forward, _widened(weight_D, x_SD.dtype)
        rounds_once = weight_D.dtype == torch.float32
        y_SD, hidden_SD, rstd_S = forward(x_SD, weight32_D, eps, residual_SD, rounds_once)
        ctx.save_for_backward(x_SD if residual_SD is None else hidden_SD, weight_D, rstd_S)
        ctx.set_materialize_grads(False)  # an unused h has no gradient to read
        return y_SD if residual_SD is None else (y_SD, hidden_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SD, dhidden_SD=None):
        hidden_SD, weight_D, rstd_S = ctx.saved_tensors
        dx_SD = dhidden_SD
        if dy_SD is not None:
            dy_SD, dhidden_SD = (None if x is None else x.contiguous() for x in (dy_SD, dhidden_SD))
            weight32_D = _widened(weight_D, hidden_SD.dtype)
            dx_SD = torch.ops.mtllm.rms_norm_backward(
                dy_SD, dhidden_SD, hidden_SD, weight32_D, rstd_S
            )
        return dx_SD, None, None, dx_SD if ctx.needs_input_grad[3] else None


def _widened(weight_D: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32, with values of the dtype unless they come as fp32."""
    is_fp32 = weight_D.dtype == torch.float32
    return weight_D.detach() if is_fp32 else weight_D.detach().to(dtype).float()
