"""Rows rounded to e4m3 on CUDA, bit for bit what `quantised.quantise_rows` makes.

With one read from memory and one write. Encoded by hand, in integers: the same on chips without
fp8, and in Triton's interpreter, whose casts truncate.
"""

import torch
import triton
import triton.language as tl


def quantise_rows(
    x_SD: torch.Tensor, column_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 (S, D), fp32 scale (S,)) of x column.

    Args:
        column_D: fp32 powers of two; None: ones.
    """
    num_tokens, width = x_SD.shape
    codes_SD = torch.empty(num_tokens, width, dtype=torch.uint8, device=x_SD.device)
    scale_S = torch.empty(num_tokens, dtype=torch.float32, device=x_SD.device)
    block = min(4096, triton.next_power_of_2(width))
    _quantise_rows[(num_tokens,)](
        x_SD.contiguous(), column_D, codes_SD, scale_S, WIDTH=width, BLOCK=block, num_warps=8
    )
    return codes_SD.view(torch.float8_e4m3fn), scale_S


@triton.jit
def _quantise_rows(
    x_ptr, column_ptr, codes_ptr, scale_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row_64 = tl.cast(tl.program_id(0), tl.int64)
    x_ptr, codes_ptr = x_ptr + row_64 * WIDTH, codes_ptr + row_64 * WIDTH
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        largest = tl.maximum(largest, tl.abs(_load(x_ptr, column_ptr, first, WIDTH, BLOCK)))
    bits = (tl.maximum(tl.max(largest, 0), 2.0**-100) * (8 / 7)).to(tl.int32, bitcast=True)
    above = bits & 0x7F800000
    scale = above.to(tl.float32, bitcast=True) * 2.0**-8
    # The reciprocal of a power of two, from its exponent; an infinite row becomes NaN, as zeros
    # times its scale.
    bits = tl.where(above == 0x7F800000, 0, 0x7F000000 - above + (8 << 23))
    inverse = bits.to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row_64, scale)
    for first in range(0, WIDTH, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        code = _encode(_load(x_ptr, column_ptr, first, WIDTH, BLOCK) * inverse)
        tl.store(codes_ptr + channels, code.to(tl.uint8), channels < WIDTH)


@triton.jit
def _load(x_ptr, column_ptr, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channels = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + channels, channels < WIDTH, other=0.0).to(tl.float32)
    if column_ptr is not None:
        x *= tl.load(column_ptr + channels, channels < WIDTH, other=0.0)
    return x


@triton.jit
def _encode(x):
    """e4m3 codes of fp32 numbers up to 448, to the nearest, ties to even.

    Their three bits of mantissa are fp32's from bit 20 on.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes count steps of 2^-9, which is the last place of numbers from 2^14 on.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return tl.where(x == x, code, 0x7F) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
