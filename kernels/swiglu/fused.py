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
        if update:
            _swiglu_updated[grid](gate_up_SF, None, y_SF, **launch)
        else:
            _swiglu_forward[grid](gate_up_SF, y_SF, **launch)
        ctx.save_for_backward(gate_up_SF, *update)
        ctx.activation = activation
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        gate_up_SF, *update = ctx.saved_tensors
        dgate_up_SF = torch.empty_like(gate_up_SF)
        grid, launch = _tile(gate_up_SF, ctx.activation, *update)
        if update:
            _swiglu_updated[grid](gate_up_SF, dy_SF.contiguous(), dgate_up_SF, **launch)
        else:
            _swiglu_backward[grid](dy_SF.contiguous(), gate_up_SF, dgate_up_SF, **launch)
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
def _swiglu_updated(
    gate_up_ptr, dy_ptr, out_ptr, low_ptr, lora_ptr, num_rows,
    IS_GELU: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
    CHUNK_S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Forward without dy, else backward; programs that follow one another share their tokens."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program, blocks = tl.program_id(0), tl.cdiv(WIDTH, BLOCK_F)
    begin, channels = program // blocks * CHUNK_S, program % blocks * BLOCK_F
    channels += tl.arange(0, BLOCK_F)
    is_channel = channels < WIDTH
    lora_gate = _tiles(lora_ptr, channels, is_channel, True, RANKS, BLOCK_Q)
    lora_up = _tiles(lora_ptr, channels + WIDTH, is_channel, True, RANKS, BLOCK_Q)
    for first in range(begin, min(begin + CHUNK_S, num_rows), BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = (rows < num_rows)[:, None] & is_channel[None, :]
        inner = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
        outer = inner + rows.to(tl.int64)[:, None] * WIDTH
        low = _tiles(low_ptr, rows, rows < num_rows, False, RANKS, BLOCK_Q)
        gate = _updated(gate_up_ptr + outer, mask, low, lora_gate)
        up = _updated(gate_up_ptr + outer + WIDTH, mask, low, lora_up)
        if dy_ptr is None:
            argument, _ = _argument_and_slope(gate, IS_GELU)
            y = gate * tl.sigmoid(argument) * up
            tl.store(out_ptr + inner, y.to(dtype), mask)
        else:
            dy = tl.load(dy_ptr + inner, mask, other=0.0).to(tl.float32)
            dgate, dup = _gradients(dy, gate, up, IS_GELU)
            tl.store(out_ptr + outer, dgate.to(dtype), mask)
            tl.store(out_ptr + outer + WIDTH, dup.to(dtype), mask)


@triton.jit
def _tiles(ptr, rows, is_row, TRANSPOSED: tl.constexpr, RANKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Rows of low or lora_B, in as many blocks as their ranks take."""
    tiles = ()
    for first in tl.static_range(0, RANKS, BLOCK_Q):
        ranks = first + tl.arange(0, BLOCK_Q)
        if TRANSPOSED:
            ptrs = ptr + rows.to(tl.int64)[None, :] * RANKS + ranks[:, None]
            mask = is_row[None, :] & (ranks < RANKS)[:, None]
        else:
            ptrs = ptr + rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
            mask = is_row[:, None] & (ranks < RANKS)[None, :]
        tiles = tiles + (tl.load(ptrs, mask, other=0.0),)
    return tiles


@triton.jit
def _updated(ptrs, mask, low, lora):
    """What is there, in fp32, and its update."""
    sums = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    for i in tl.static_range(len(low)):
        sums = dot(low[i], lora[i], sums)
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
