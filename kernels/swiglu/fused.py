"""SwiGLU in one pass each way: nothing but the input is kept, and its gradient is one tensor."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs

BLOCK = 1024  # channels of a program
NUM_WARPS = 4  # 8 channels a thread: 16-byte loads


def swiglu(gate_up_SF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, fp32 inside, half as wide as the argument and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous: the gate's channels, then as many of the
            up-projection.

    Raises:
        ValueError: The argument is not contiguous, or of a wrong shape or dtype.

    Source: arXiv 2002.05202, eq. 5.
    """
    check_inputs(gate_up_SF)
    return _SwiGlu.apply(gate_up_SF)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_SF):
        tokens, width = gate_up_SF.shape
        y_SF = gate_up_SF.new_empty(tokens, width // 2)
        grid, launch = _tile(gate_up_SF)
        _swiglu_forward[grid](gate_up_SF, y_SF, **launch)
        ctx.save_for_backward(gate_up_SF)
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        (gate_up_SF,) = ctx.saved_tensors
        dgate_up_SF = torch.empty_like(gate_up_SF)
        grid, launch = _tile(gate_up_SF)
        _swiglu_backward[grid](dy_SF.contiguous(), gate_up_SF, dgate_up_SF, **launch)
        return dgate_up_SF


def _tile(gate_up_SF: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """One grid axis, for the others end at 65535: the blocks of a token, then of the next."""
    width = gate_up_SF.shape[1] // 2
    grid = (len(gate_up_SF) * triton.cdiv(width, BLOCK),)
    return grid, {"WIDTH": width, "BLOCK": BLOCK, "num_warps": NUM_WARPS}


@triton.jit
def _swiglu_forward(gate_up_ptr, y_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token, channels = _token_and_channels(WIDTH, BLOCK)
    mask = channels < WIDTH
    gate_ptrs = gate_up_ptr + token * (2 * WIDTH) + channels
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + token * WIDTH + channels, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward(dy_ptr, gate_up_ptr, dgate_up_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    token, channels = _token_and_channels(WIDTH, BLOCK)
    mask = channels < WIDTH
    offsets = token * (2 * WIDTH) + channels
    dy = tl.load(dy_ptr + token * WIDTH + channels, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + offsets, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offsets + WIDTH, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_up_ptr + offsets, dgate.to(dtype), mask)
    tl.store(dgate_up_ptr + offsets + WIDTH, (dy * gate * sigmoid).to(dtype), mask)


@triton.jit
def _token_and_channels(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's token (64 bits, for its offset) and channels."""
    program, blocks = tl.program_id(0), tl.cdiv(WIDTH, BLOCK)
    return tl.cast(program // blocks, tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
