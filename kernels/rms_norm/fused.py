"""RMSNorm with the residual's addition: programs hold whole rows, so that every byte moves once."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs

MAX_WIDTH = 32768  # above 16384 some registers spill: right, but slower


def rms_norm(
    x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_SD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h): h = x + residual, rounded to x's dtype, and its RMSNorm y.

    Without a residual h is x itself, not a copy.

    Args:
        x_SD: fp32, bf16 or fp16, contiguous, at most MAX_WIDTH wide.
        weight_D: fp32, and then y is rounded once, or another of these dtypes, and then it and the
            normalised value are rounded to x's before they are multiplied. Frozen; never gets a
            gradient.
        residual_SD: Like x.

    Raises:
        ValueError: An argument is not contiguous, on another device, or of a wrong shape or dtype.

    Source: arXiv 1910.07467, eq. 4.
    """
    check_inputs(x_SD, weight_D, residual_SD, max_width=MAX_WIDTH)
    if residual_SD is None:
        return _RmsNorm.apply(x_SD, weight_D, eps, None), x_SD
    return _RmsNorm.apply(x_SD, weight_D, eps, residual_SD)


class _RmsNorm(torch.autograd.Function):
    """y, or with a residual (y, h).

    Keeps h and the weight: rstd costs backward one sum over a row that it holds.
    """

    @staticmethod
    def forward(ctx, x_SD, weight_D, eps, residual_SD):
        y_SD = torch.empty_like(x_SD)
        hidden_SD = x_SD if residual_SD is None else torch.empty_like(x_SD)
        grid, launch = _tile(x_SD)
        _rms_norm_forward[grid](
            x_SD, residual_SD, weight_D, y_SD, hidden_SD, len(x_SD), eps, **launch
        )
        ctx.save_for_backward(hidden_SD, weight_D)
        ctx.eps = eps
        # An unused h has no gradient to read, nor a zero one to write
        ctx.set_materialize_grads(False)
        return y_SD if residual_SD is None else (y_SD, hidden_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SD, dhidden_SD=None):
        hidden_SD, weight_D = ctx.saved_tensors
        dx_SD = dhidden_SD
        if dy_SD is not None:
            dy_SD, dhidden_SD = (None if x is None else x.contiguous() for x in (dy_SD, dhidden_SD))
            dx_SD = torch.empty_like(hidden_SD)
            grid, launch = _tile(hidden_SD)
            _rms_norm_backward[grid](
                dy_SD, dhidden_SD, hidden_SD, weight_D, dx_SD, len(hidden_SD), ctx.eps, **launch
            )
        return dx_SD, None, None, dx_SD if ctx.needs_input_grad[3] else None


def _tile(x_SD: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """A row per program, or several narrow ones.

    16 elements a thread are two 16-byte loads and stay in registers.
    """
    block = triton.next_power_of_2(x_SD.shape[1])
    rows = max(1, 2048 // block)
    num_warps = min(32, max(4, rows * block // 512))
    launch = {"WIDTH": x_SD.shape[1], "ROWS": rows, "BLOCK": block, "num_warps": num_warps}
    return (triton.cdiv(len(x_SD), rows),), launch


@triton.jit
def _rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, hidden_ptr, num_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    offsets, mask = rows * WIDTH + columns, (rows < num_rows) & (columns < WIDTH)
    hidden = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
        rounded = (hidden + residual).to(dtype)
        tl.store(hidden_ptr + offsets, rounded, mask)
        hidden = rounded.to(tl.float32)  # backward sees h as stored: so must y
    weight = tl.load(weight_ptr + columns, columns < WIDTH, other=0.0)
    rstd = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / WIDTH + eps)[:, None]
    scaled = hidden * rstd
    if weight_ptr.dtype.element_ty != tl.float32:
        weight, scaled = weight.to(dtype).to(tl.float32), scaled.to(dtype).to(tl.float32)
    tl.store(y_ptr + offsets, (scaled * weight).to(dtype), mask)


@triton.jit
def _rms_norm_backward(
    dy_ptr, dhidden_ptr, hidden_ptr, weight_ptr, dx_ptr, num_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (dy w - h * rstd^2 * mean(dy w h)) + dh."""
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    rows = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    offsets, mask = rows * WIDTH + columns, (rows < num_rows) & (columns < WIDTH)
    hidden = tl.load(hidden_ptr + offsets, mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, columns < WIDTH, other=0.0)
    if weight_ptr.dtype.element_ty != tl.float32:
        weight = weight.to(dtype).to(tl.float32)
    dscaled = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32) * weight
    rstd = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / WIDTH + eps)[:, None]
    dot = tl.sum(dscaled * hidden, axis=1)[:, None]
    dx = rstd * (dscaled - hidden * (rstd * rstd * dot / WIDTH))
    if dhidden_ptr is not None:
        dx += tl.load(dhidden_ptr + offsets, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx.to(dtype), mask)
