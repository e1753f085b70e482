"""LayerNorm and Linear as one GEMM on the raw x: no normalised copy of it is ever in memory, forward or backward.

With w = W * gamma, u_d = sum_e w_de and c_d = sum_e W_de beta_e + b_d:
    LayerNorm(x) W^T + b = rstd (x w^T - mean u) + c
u is summed from w as rounded, so that the mean cancels but for the GEMM's own fp32 rounding, times mean / deviation.
The statistics take a read of x of their own. From the GEMM's tiles they would race: of a tile that both Hopper's
asynchronous product and a sum read, Triton's pipeline (3.9) keeps a copy too few, and loads the next tile into the one
that is still being multiplied.
"""

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.blocks import dot, place
from mtllm_engine.kernels.contract import DTYPES, check, check_shape
from torch.autograd.function import once_differentiable

MAX_WIDTH = 16384  # E up to which a program holds a row in registers
GROUP = 8  # blocks of rows that share the other operand's tiles
PROGRAMS = 264  # two for each multiprocessor of an H100; a constant, for results depend on how sums are split


def projection(
    x_SE: torch.Tensor,
    norm_weight_E: torch.Tensor,
    norm_bias_E: torch.Tensor,
    eps: float,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    """LayerNorm(x) W^T + b in x's dtype. Backward keeps x and its fp32 statistics.

    Args:
        x_SE: fp32, bf16 or fp16, contiguous, at most MAX_WIDTH wide.
        norm_weight_E: fp32, bf16 or fp16. Frozen; never gets a gradient.
        norm_bias_E: Like norm_weight.
        weight_DE: fp32, bf16 or fp16, contiguous; W * gamma is rounded to x's dtype once; its gradient sums in fp32.
        bias_D: Like weight.

    Raises:
        ValueError: An argument is not contiguous, on another device, or of a wrong shape or dtype.

    Source: arXiv 2406.12739, section 3; arXiv 1607.06450, eq. 4.
    """
    check(x_SE, x_SE=x_SE, norm_weight_E=norm_weight_E, norm_bias_E=norm_bias_E, weight_DE=weight_DE, bias_D=bias_D)
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
        folded_DE, u_D, c_D = _fold(x_SE.dtype, norm_weight_E, norm_bias_E, weight_DE, bias_D)
        y_SD, mean_S, rstd_S = _normed_matmul(x_SE, folded_DE, u_D, c_D, eps)
        ctx.save_for_backward(x_SE, mean_S, rstd_S, norm_weight_E, norm_bias_E, weight_DE)
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SD):
        x_SE, mean_S, rstd_S, norm_weight_E, norm_bias_E, weight_DE = ctx.saved_tensors
        dy_SD = dy_SD.contiguous()
        dx_SE = dweight_DE = dbias_D = None
        if ctx.needs_input_grad[0]:
            folded_DE, _, _ = _fold(x_SE.dtype, norm_weight_E, norm_bias_E, weight_DE, None)
            dx_SE = _norm_backward(dy_SD @ folded_DE, x_SE, mean_S, rstd_S)
        if ctx.needs_input_grad[4]:
            dweight_DE = _weight_gradient(dy_SD, x_SE, mean_S, rstd_S, norm_weight_E, norm_bias_E)
        if ctx.needs_input_grad[5]:
            dbias_D = dy_SD.sum(0, dtype=torch.float32)
        return dx_SE, None, None, None, dweight_DE, dbias_D


def _fold(dtype, norm_weight_E, norm_bias_E, weight_DE, bias_D):
    """w in `dtype`, and u and c in fp32."""
    out_width, width = weight_DE.shape
    folded_DE = torch.empty_like(weight_DE, dtype=dtype)
    u_D, c_D = weight_DE.new_empty(2, out_width, dtype=torch.float32)
    _fold_kernel[triton.cdiv(out_width, 4),](
        weight_DE, norm_weight_E, norm_bias_E, bias_D, folded_DE, u_D, c_D, out_width,
        WIDTH=width, BLOCK_D=4, BLOCK_E=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return folded_DE, u_D, c_D


def _normed_matmul(x_SE, folded_DE, u_D, c_D, eps):
    """(y, mean, rstd)"""
    (num_tokens, width), out_width = x_SE.shape, len(folded_DE)
    y_SD = x_SE.new_empty(num_tokens, out_width)
    mean_S, rstd_S = x_SE.new_empty(2, num_tokens, dtype=torch.float32)
    _statistics[num_tokens,](x_SE, mean_S, rstd_S, eps, WIDTH=width, **_row(width))
    tile = _tile(x_SE.dtype)
    grid = (triton.cdiv(num_tokens, tile["BLOCK_S"]) * triton.cdiv(out_width, tile["BLOCK_D"]),)
    _projection_gemm[grid](
        x_SE, folded_DE, u_D, c_D, mean_S, rstd_S, y_SD, num_tokens,
        WIDTH=width, OUT_WIDTH=out_width, GROUP=GROUP, **tile,
    )  # fmt: skip
    return y_SD, mean_S, rstd_S


def _row(width):
    """A program that holds a row in registers."""
    block_E = triton.next_power_of_2(width)
    return {"BLOCK_E": block_E, "num_warps": min(16, max(1, block_E // 512))}


def _tile(dtype):
    if dtype == torch.float32:
        return {"BLOCK_S": 64, "BLOCK_D": 64, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_S": 128, "BLOCK_D": 256, "BLOCK_E": 64, "num_warps": 8, "num_stages": 3}


def _weight_gradient(dy_SD, x_SE, mean_S, rstd_S, norm_weight_E, norm_bias_E):
    """dy^T LayerNorm(x), which is rounded to x's dtype as in the definition, but tile by tile as they are loaded."""
    (num_tokens, width), out_width = x_SE.shape, dy_SD.shape[1]
    if x_SE.dtype == torch.float32:
        tile = {"BLOCK_D": 64, "BLOCK_E": 64, "BLOCK_S": 32, "num_warps": 4, "num_stages": 2}
    else:
        tile = {"BLOCK_D": 128, "BLOCK_E": 128, "BLOCK_S": 64, "num_warps": 8, "num_stages": 3}
    blocks = triton.cdiv(out_width, tile["BLOCK_D"]) * triton.cdiv(width, tile["BLOCK_E"])
    steps = triton.cdiv(num_tokens, tile["BLOCK_S"])
    chunk = max(1, triton.cdiv(steps, max(1, PROGRAMS // blocks))) * tile["BLOCK_S"]
    splits = max(1, triton.cdiv(num_tokens, chunk))
    parts_CDE = dy_SD.new_empty(splits, out_width, width, dtype=torch.float32)
    _weight_gemm[blocks, splits](
        dy_SD, x_SE, mean_S, rstd_S, norm_weight_E, norm_bias_E, parts_CDE, num_tokens, chunk,
        WIDTH=width, OUT_WIDTH=out_width, GROUP=GROUP, **tile,
    )  # fmt: skip
    return parts_CDE[0] if splits == 1 else parts_CDE.sum(0)


def _norm_backward(dnormed_SE, x_SE, mean_S, rstd_S):
    """dx, in the place of the gradient of (x - mean) rstd."""
    num_tokens, width = x_SE.shape
    _norm_backward_kernel[num_tokens,](dnormed_SE, x_SE, mean_S, rstd_S, WIDTH=width, **_row(width))
    return dnormed_SE


@triton.jit
def _fold_kernel(
    weight_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, folded_ptr, u_ptr, c_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = folded_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    u, c = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        c += tl.load(bias_ptr + rows, rows < num_rows, other=0.0).to(tl.float32)
    for first in range(0, WIDTH, BLOCK_E):
        columns = first + tl.arange(0, BLOCK_E)
        offsets, is_column = tl.cast(rows, tl.int64)[:, None] * WIDTH + columns[None, :], columns < WIDTH
        mask = (rows < num_rows)[:, None] & is_column[None, :]
        weight = tl.load(weight_ptr + offsets, mask, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + columns, is_column, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + columns, is_column, other=0.0).to(tl.float32)
        folded = (weight * norm_weight[None, :]).to(dtype)
        tl.store(folded_ptr + offsets, folded, mask)
        u += tl.sum(folded.to(tl.float32), axis=1)
        c += tl.sum(weight * norm_bias[None, :], axis=1)
    tl.store(u_ptr + rows, u, rows < num_rows)
    tl.store(c_ptr + rows, c, rows < num_rows)


@triton.jit
def _statistics(x_ptr, mean_ptr, rstd_ptr, eps, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    row, columns = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + row * WIDTH + columns, columns < WIDTH, other=0.0).to(tl.float32)
    mean = tl.sum(x) / WIDTH
    distance = tl.where(columns < WIDTH, x - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(distance * distance) / WIDTH + eps))


@triton.jit
def _projection_gemm(
    x_ptr, folded_ptr, u_ptr, c_ptr, mean_ptr, rstd_ptr, y_ptr, num_rows,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first_row, first_channel = place(num_rows, OUT_WIDTH, GROUP, BLOCK_S, BLOCK_D)
    rows, channels = tl.arange(0, BLOCK_S), first_channel + tl.arange(0, BLOCK_D)
    is_row, is_channel = first_row + rows < num_rows, channels < OUT_WIDTH
    first_64 = tl.cast(first_row, tl.int64)
    x_ptrs = x_ptr + first_64 * WIDTH + rows[:, None] * WIDTH
    y = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for first in range(0, WIDTH, BLOCK_E):
        columns = first + tl.arange(0, BLOCK_E)
        is_column = columns < WIDTH
        x = tl.load(x_ptrs + columns[None, :], is_row[:, None] & is_column[None, :], other=0.0)
        folded_ptrs = folded_ptr + channels[None, :] * WIDTH + columns[:, None]
        y = dot(x, tl.load(folded_ptrs, is_channel[None, :] & is_column[:, None], other=0.0), y)
    mean = tl.load(mean_ptr + first_row + rows, is_row, other=0.0)
    rstd = tl.load(rstd_ptr + first_row + rows, is_row, other=0.0)
    u = tl.load(u_ptr + channels, is_channel, other=0.0)
    c = tl.load(c_ptr + channels, is_channel, other=0.0)
    y = (y - mean[:, None] * u[None, :]) * rstd[:, None] + c[None, :]
    y_ptrs = y_ptr + first_64 * OUT_WIDTH + rows[:, None] * OUT_WIDTH + channels[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), is_row[:, None] & is_channel[None, :])


@triton.jit
def _weight_gemm(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, dweight_ptr, num_rows, chunk,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    first_channel, first_column = place(OUT_WIDTH, WIDTH, GROUP, BLOCK_D, BLOCK_E)
    channels, columns = first_channel + tl.arange(0, BLOCK_D), first_column + tl.arange(0, BLOCK_E)
    is_channel, is_column = channels < OUT_WIDTH, columns < WIDTH
    norm_weight = tl.load(norm_weight_ptr + columns, is_column, other=0.0).to(tl.float32)[None, :]
    norm_bias = tl.load(norm_bias_ptr + columns, is_column, other=0.0).to(tl.float32)[None, :]
    rows = tl.arange(0, BLOCK_S)
    dweight = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    begin = tl.program_id(1) * chunk
    for first in range(begin, min(begin + chunk, num_rows), BLOCK_S):
        first_64, is_row = tl.cast(first, tl.int64), first + rows < num_rows
        dy_ptrs = dy_ptr + first_64 * OUT_WIDTH + rows[None, :] * OUT_WIDTH + channels[:, None]
        dy = tl.load(dy_ptrs, is_row[None, :] & is_channel[:, None], other=0.0)
        x_ptrs = x_ptr + first_64 * WIDTH + rows[:, None] * WIDTH + columns[None, :]
        x = tl.load(x_ptrs, is_row[:, None] & is_column[None, :], other=0.0)
        mean = tl.load(mean_ptr + first + rows, is_row, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + first + rows, is_row, other=0.0)[:, None]
        normed = (x.to(tl.float32) - mean) * rstd * norm_weight + norm_bias
        dweight = dot(dy, normed.to(x_ptr.dtype.element_ty), dweight)
    dweight_ptrs = dweight_ptr + tl.program_id(1) * tl.cast(OUT_WIDTH, tl.int64) * WIDTH
    dweight_ptrs += channels[:, None] * WIDTH + columns[None, :]
    tl.store(dweight_ptrs, dweight, is_channel[:, None] & is_column[None, :])


@triton.jit
def _norm_backward_kernel(dnormed_ptr, x_ptr, mean_ptr, rstd_ptr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """dx = rstd (g - mean(g) - n mean(g n)) with n = (x - mean) rstd and its gradient g"""
    row, columns = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    is_column = columns < WIDTH
    dnormed_ptrs = dnormed_ptr + row * WIDTH + columns
    dnormed = tl.load(dnormed_ptrs, is_column, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * WIDTH + columns, is_column, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normed = (x - tl.load(mean_ptr + row)) * rstd
    shift = tl.sum(dnormed) / WIDTH
    slope = tl.sum(dnormed * normed) / WIDTH
    dx = rstd * (dnormed - shift - normed * slope)
    tl.store(dnormed_ptrs, dx.to(dnormed_ptr.dtype.element_ty), is_column)
