"""LayerNorm in Triton, which reads x once, and cuBLAS for the products.

The normalised states live for the length of a product: backward keeps x alone and makes them again,
for which it reads what it would read of them anyway.
"""

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.contract import DTYPES, check, check_shape
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_WIDTH = 16384  # E up to which a program holds a row in registers


def projection(
    x_SE: torch.Tensor,
    norm_weight_E: torch.Tensor,
    norm_bias_E: torch.Tensor,
    eps: float,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    """LayerNorm(x) W^T + b in x's dtype. Backward keeps x.

    Args:
        x_SE: fp32, bf16 or fp16, contiguous, at most MAX_WIDTH wide.
        norm_weight_E: fp32, bf16 or fp16. Frozen; never gets a gradient.
        norm_bias_E: Like norm_weight.
        weight_DE: fp32, bf16 or fp16, contiguous; rounded to x's dtype once; its gradient is summed
            and left in fp32.
        bias_D: Like weight.

    Raises:
        ValueError: An argument is not contiguous, on another device, or of a wrong shape or dtype.

    Source: arXiv 2406.12739, section 3; arXiv 1607.06450, eq. 4.
    """
    check(x_SE, x_SE=x_SE, norm_weight_E=norm_weight_E, norm_bias_E=norm_bias_E)
    check(x_SE, weight_DE=weight_DE, bias_D=bias_D)
    check_shape((None, None), DTYPES, x_SE=x_SE)
    check_shape(x_SE.shape[1:], DTYPES, norm_weight_E=norm_weight_E, norm_bias_E=norm_bias_E)
    check_shape((None, x_SE.shape[1]), DTYPES, weight_DE=weight_DE)
    check_shape(weight_DE.shape[:1], DTYPES, bias_D=bias_D)
    if not 0 < x_SE.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x_SE is {x_SE.shape[1]} wide, expected 1 to {MAX_WIDTH}")
    return _Projection.apply(x_SE, norm_weight_E, norm_bias_E, eps, weight_DE, bias_D)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SE, norm_weight_E, norm_bias_E, eps, weight_DE, bias_D):
        ctx.save_for_backward(x_SE, norm_weight_E, norm_bias_E, weight_DE)
        ctx.eps = eps
        normed_SE = _normalise(x_SE, norm_weight_E, norm_bias_E, eps)
        bias_D = None if bias_D is None else bias_D.to(x_SE.dtype)
        return functional.linear(normed_SE, weight_DE.to(x_SE.dtype), bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SD):
        x_SE, norm_weight_E, norm_bias_E, weight_DE = ctx.saved_tensors
        dx_SE = dweight_DE = dbias_D = None
        if ctx.needs_input_grad[0]:
            dnormed_SE = dy_SD @ weight_DE.to(x_SE.dtype)
            dx_SE = _launch(_norm_backward, dnormed_SE, x_SE, norm_weight_E, ctx.eps)
        if ctx.needs_input_grad[4]:
            normed_SE = _normalise(x_SE, norm_weight_E, norm_bias_E, ctx.eps)
            dweight_DE = _product_in_fp32(dy_SD.T, normed_SE)
        if ctx.needs_input_grad[5]:
            dbias_D = dy_SD.sum(0, dtype=torch.float32)
        return dx_SE, None, None, None, dweight_DE, dbias_D


def _normalise(
    x_SE: torch.Tensor, norm_weight_E: torch.Tensor, norm_bias_E: torch.Tensor, eps: float
) -> torch.Tensor:
    return _launch(_norm_forward, torch.empty_like(x_SE), x_SE, norm_weight_E, norm_bias_E, eps)


def _launch(
    kernel: triton.JITFunction, out_SE: torch.Tensor, *arguments: torch.Tensor | float
) -> torch.Tensor:
    """A program for each row, which it holds in registers."""
    num_tokens, width = out_SE.shape
    block = triton.next_power_of_2(width)
    num_warps = min(16, max(1, block // 512))
    kernel[num_tokens,](out_SE, *arguments, WIDTH=width, BLOCK_E=block, num_warps=num_warps)
    return out_SE


def _product_in_fp32(a_DS: torch.Tensor, b_SE: torch.Tensor) -> torch.Tensor:
    """Of halves cuBLAS can leave its fp32 sums as they are."""
    if a_DS.is_cuda and a_DS.dtype != torch.float32:
        return torch.mm(a_DS, b_SE, out_dtype=torch.float32)
    return a_DS.float() @ b_SE.float()


@triton.jit
def _norm_forward(
    y_ptr, x_ptr, weight_ptr, bias_ptr, eps, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr
):
    row, columns = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    is_column = columns < WIDTH
    normed, _ = _normed(x_ptr + row * WIDTH + columns, is_column, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, is_column, other=0.0).to(tl.float32)
    y = normed * weight + bias
    tl.store(y_ptr + row * WIDTH + columns, y.to(y_ptr.dtype.element_ty), is_column)


@triton.jit
def _norm_backward(dy_ptr, x_ptr, weight_ptr, eps, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """dx = rstd (g - mean(g) - n mean(g n)), over dy; n = (x - mean) rstd, g its gradient."""
    row, columns = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    is_column = columns < WIDTH
    normed, rstd = _normed(x_ptr + row * WIDTH + columns, is_column, eps, WIDTH)
    dy_ptrs = dy_ptr + row * WIDTH + columns
    weight = tl.load(weight_ptr + columns, is_column, other=0.0).to(tl.float32)
    dnormed = tl.load(dy_ptrs, is_column, other=0.0).to(tl.float32) * weight
    shift = tl.sum(dnormed) / WIDTH
    slope = tl.sum(dnormed * normed) / WIDTH
    dx = rstd * (dnormed - shift - normed * slope)
    tl.store(dy_ptrs, dx.to(dy_ptr.dtype.element_ty), is_column)


@triton.jit
def _normed(x_ptrs, is_column, eps, WIDTH: tl.constexpr):
    """((x - mean) rstd, 0 beyond the row; rstd)"""
    x = tl.load(x_ptrs, is_column, other=0.0).to(tl.float32)
    distance = tl.where(is_column, x - tl.sum(x) / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(distance * distance) / WIDTH + eps)
    return distance * rstd, rstd
