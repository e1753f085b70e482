"""SwiGLU in one pass each way: nothing but the input is kept, and its gradient is one tensor.

An update is a product of few ranks, made in registers beside the tile that it is added to; 16 rows
of it, so that Triton does not take Hopper's asynchronous products, see lora_linear/low_rank.py.
"""

import torch
import triton
import triton.language as tl
from mtllm_engine.kernels.blocks import dot
from mtllm_engine.kernels.contract import Update
from torch.autograd.function import once_differentiable

from .checks import check_inputs

BLOCK = 1024  # channels of a program
NUM_WARPS = 4  # 8 channels a thread: 16-byte loads
CHUNK_S = 128  # tokens of a program that adds an update: it reads lora once for all of them


def swiglu(
    gate_up_SF: torch.Tensor, activation: str = "silu", update: Update | None = None
) -> torch.Tensor:
    """activation(gate) * up, fp32 inside, half as wide as the tensor and of its dtype.

    Args:
        gate_up_SF: fp32, bf16 or fp16, contiguous: the gate's channels, then as many of the
            up-projection.
        activation: silu, or gelu_tanh as Gemma's.
        update: Contiguous and like gate_up, to which its product is added first. Gets no gradient;
            gate_up's is that of the sum.

    Raises:
        ValueError: There is no such activation, or the tensor is not contiguous, or of a wrong
            shape or dtype.

    Source: arXiv 2002.05202, eq. 5 and 6.
    """
    check_inputs(gate_up_SF, activation, update)
    return _SwiGlu.apply(gate_up_SF, activation, *(update or ()))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_SF, activation, *update):
        tokens, width = gate_up_SF.shape
        y_SF = gate_up_SF.new_empty(tokens, width // 2)
        grid, launch = _tile(gate_up_SF, activation, *update)
        kernel = _updated_forward if update else _swiglu_forward
        kernel[grid](gate_up_SF, y_SF, **launch)
        ctx.save_for_backward(gate_up_SF, *update)
        ctx.activation = activation
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        gate_up_SF, *update = ctx.saved_tensors
        dgate_up_SF = torch.empty_like(gate_up_SF)
        grid, launch = _tile(gate_up_SF, ctx.activation, *update)
        kernel = _updated_backward if update else _swiglu_backward
        kernel[grid](dy_SF.contiguous(), gate_up_SF, dgate_up_SF, **launch)
        return dgate_up_SF, None, *(None for _ in update)


def _tile(
    gate_up_SF: torch.Tensor, activation: str, *update: torch.Tensor
) -> tuple[tuple[int], dict[str, int | torch.Tensor]]:
    """One grid axis, for the others end at 65535: the blocks of a token, then of the next; with an
    update the blocks of CHUNK_S tokens."""
    num_tokens, width = len(gate_up_SF), gate_up_SF.shape[1] // 2
    launch = {"IS_GELU": activation == "gelu_tanh", "WIDTH": width}
    if not update:
        grid = (num_tokens * triton.cdiv(width, BLOCK),)
        return grid, launch | {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    low_SQ, lora_B_FQ = update
    num_ranks, block_F = low_SQ.shape[1], 128 if low_SQ.itemsize == 2 else 64
    grid = (triton.cdiv(num_tokens, CHUNK_S) * triton.cdiv(width, block_F),)
    operands = {"low_ptr": low_SQ, "lora_ptr": lora_B_FQ, "num_rows": num_tokens}
    block_Q = max(16, min(64, triton.next_power_of_2(num_ranks)))
    sizes = {"RANKS": num_ranks, "BLOCK_S": 16, "BLOCK_F": block_F, "BLOCK_Q": block_Q}
    return grid, launch | operands | sizes | {"CHUNK_S": CHUNK_S, "num_warps": 8}


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
    dgate, dup = _gradients(dy, gate, up, IS_GELU)
    tl.store(dgate_up_ptr + offsets, dgate.to(dtype), mask)
    tl.store(dgate_up_ptr + offsets + WIDTH, dup.to(dtype), mask)


@triton.jit
def _updated_forward(
    gate_up_ptr, y_ptr, low_ptr, lora_ptr, num_rows,
    IS_GELU: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
    CHUNK_S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    begin, channels = _chunk_and_channels(WIDTH, CHUNK_S, BLOCK_F)
    lora_gate = _lora(lora_ptr, channels, channels < WIDTH, RANKS, BLOCK_Q)
    lora_up = _lora(lora_ptr, channels + WIDTH, channels < WIDTH, RANKS, BLOCK_Q)
    for first in range(begin, min(begin + CHUNK_S, num_rows), BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = (rows < num_rows)[:, None] & (channels < WIDTH)[None, :]
        inner = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
        gate_ptrs = gate_up_ptr + inner + rows.to(tl.int64)[:, None] * WIDTH
        lows = _low(low_ptr, rows, num_rows, RANKS, BLOCK_Q)
        gate = _updated(gate_ptrs, mask, lows, lora_gate)
        up = _updated(gate_ptrs + WIDTH, mask, lows, lora_up)
        argument, _ = _argument_and_slope(gate, IS_GELU)
        y = gate * tl.sigmoid(argument) * up
        tl.store(y_ptr + inner, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _updated_backward(
    dy_ptr, gate_up_ptr, dgate_up_ptr, low_ptr, lora_ptr, num_rows,
    IS_GELU: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
    CHUNK_S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    begin, channels = _chunk_and_channels(WIDTH, CHUNK_S, BLOCK_F)
    lora_gate = _lora(lora_ptr, channels, channels < WIDTH, RANKS, BLOCK_Q)
    lora_up = _lora(lora_ptr, channels + WIDTH, channels < WIDTH, RANKS, BLOCK_Q)
    for first in range(begin, min(begin + CHUNK_S, num_rows), BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = (rows < num_rows)[:, None] & (channels < WIDTH)[None, :]
        inner = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
        offsets = inner + rows.to(tl.int64)[:, None] * WIDTH
        lows = _low(low_ptr, rows, num_rows, RANKS, BLOCK_Q)
        gate = _updated(gate_up_ptr + offsets, mask, lows, lora_gate)
        up = _updated(gate_up_ptr + offsets + WIDTH, mask, lows, lora_up)
        dy = tl.load(dy_ptr + inner, mask, other=0.0).to(tl.float32)
        dgate, dup = _gradients(dy, gate, up, IS_GELU)
        tl.store(dgate_up_ptr + offsets, dgate.to(dtype), mask)
        tl.store(dgate_up_ptr + offsets + WIDTH, dup.to(dtype), mask)


@triton.jit
def _chunk_and_channels(WIDTH: tl.constexpr, CHUNK_S: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's first token, and its channels: programs that follow share the tokens."""
    program, blocks = tl.program_id(0), tl.cdiv(WIDTH, BLOCK_F)
    return program // blocks * CHUNK_S, program % blocks * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def _lora(lora_ptr, channels, is_channel, RANKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """lora_B^T of these channels, in as many blocks as its ranks take."""
    tiles = ()
    for first in tl.static_range(0, RANKS, BLOCK_Q):
        ranks = first + tl.arange(0, BLOCK_Q)
        lora_ptrs = lora_ptr + channels.to(tl.int64)[None, :] * RANKS + ranks[:, None]
        mask = is_channel[None, :] & (ranks < RANKS)[:, None]
        tiles = tiles + (tl.load(lora_ptrs, mask, other=0.0),)
    return tiles


@triton.jit
def _low(low_ptr, rows, num_rows, RANKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The low-rank activations of these tokens, in as many blocks."""
    tiles = ()
    for first in tl.static_range(0, RANKS, BLOCK_Q):
        ranks = first + tl.arange(0, BLOCK_Q)
        low_ptrs = low_ptr + rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
        mask = (rows < num_rows)[:, None] & (ranks < RANKS)[None, :]
        tiles = tiles + (tl.load(low_ptrs, mask, other=0.0),)
    return tiles


@triton.jit
def _updated(ptrs, mask, lows, loras):
    """What is there, in fp32, and its update."""
    sums = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    for i in tl.static_range(len(lows)):
        sums = dot(lows[i], loras[i], sums)
    return sums


@triton.jit
def _gradients(dy, gate, up, IS_GELU: tl.constexpr):
    argument, slope = _argument_and_slope(gate, IS_GELU)
    sigmoid = tl.sigmoid(argument)
    return dy * up * sigmoid * (1 + slope * (1 - sigmoid)), dy * gate * sigmoid


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
