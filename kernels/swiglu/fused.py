"""SwiGLU in one pass each way: nothing but the input is kept, and its gradient is one tensor."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs

BLOCK = 1024  # channels of a program
NUM_WARPS = 4  # 8 channels a thread: 16-byte loads


def swiglu(gate_up_SF: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """activation(gate) * up, fp32 inside, half as wide as the tensor and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous: the gate's channels, then as many of the
            up-projection.
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
        tokens, width = gate_up_SF.shape
        y_SF = gate_up_SF.new_empty(tokens, width // 2)
        grid, launch = _tile(gate_up_SF, activation)
        _swiglu_forward[grid](gate_up_SF, y_SF, **launch)
        ctx.save_for_backward(gate_up_SF)
        ctx.activation = activation
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        (gate_up_SF,) = ctx.saved_tensors
        dgate_up_SF = torch.empty_like(gate_up_SF)
        grid, launch = _tile(gate_up_SF, ctx.activation)
        _swiglu_backward[grid](dy_SF.contiguous(), gate_up_SF, dgate_up_SF, **launch)
        return dgate_up_SF, None


def _tile(gate_up_SF: torch.Tensor, activation: str) -> tuple[tuple[int], dict[str, int]]:
    """One grid axis, for the others end at 65535: the blocks of a token, then of the next."""
    width = gate_up_SF.shape[1] // 2
    grid = (len(gate_up_SF) * triton.cdiv(width, BLOCK),)
    tile = {"WIDTH": width, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    return grid, {"IS_GELU": activation == "gelu_tanh", **tile}


@triton.jit
def _swiglu_forward(
    gate_up_ptr, y_ptr, IS_GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token, channels = _token_and_channels(WIDTH, BLOCK)
    mask = channels < WIDTH
    gate_ptrs = gate_up_ptr + token * (2 * WIDTH) + channels
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask, other=0.0).to(tl.float32)
    argument, _ = _argument_and_slope(gate, IS_GELU)
    y = gate * tl.sigmoid(argument) * up
    tl.store(y_ptr + token * WIDTH + channels, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_up_ptr, dgate_up_ptr,
    IS_GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    token, channels = _token_and_channels(WIDTH, BLOCK)
    mask = channels < WIDTH
    offsets = token * (2 * WIDTH) + channels
    dy = tl.load(dy_ptr + token * WIDTH + channels, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + offsets, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offsets + WIDTH, mask, other=0.0).to(tl.float32)
    argument, slope = _argument_and_slope(gate, IS_GELU)
    sigmoid = tl.sigmoid(argument)
    dgate = dy * up * sigmoid * (1 + slope * (1 - sigmoid))
    tl.store(dgate_up_ptr + offsets, dgate.to(dtype), mask)
    tl.store(dgate_up_ptr + offsets + WIDTH, (dy * gate * sigmoid).to(dtype), mask)


@triton.jit
def _argument_and_slope(gate, IS_GELU: tl.constexpr):
    """a, where the activation is gate * sigmoid(a), and gate * da/dgate.

    Of gelu too, for 1 + tanh(z) is 2 sigmoid(2 z), which cancels nothing. Beyond 11 its sigmoid is
    0 or 1 in fp32, and a cube could be infinite, which backward would multiply by 0.
    """
    if not IS_GELU:
        return gate, gate
    gate = tl.clamp(gate, -11.0, 11.0, propagate_nan=tl.PropagateNan.ALL)
    linear, cubic = 1.5957691216 * gate, 0.0713548163 * gate * gate * gate
    return linear + cubic, linear + 3 * cubic


@triton.jit
def _token_and_channels(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's token (64 bits, for its offset) and channels."""
    program, blocks = tl.program_id(0), tl.cdiv(WIDTH, BLOCK)
    return tl.cast(program // blocks, tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
