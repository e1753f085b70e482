"""distill_loss in Triton: states are read once each way, however long or short the spans are."""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mtllm_engine.spans import CHUNK, Spans

from .checks import check_inputs
from .pooling import join_kernel, load_row, rstd_of, total_kernel, walk_kernel
from .reference import Distilled

MIN_SHARE = 16  # merged tokens: for fewer, another program is not worth its sums
TILE = 4096  # elements that a program holds while it joins cut spans or adds up


def distill_loss(
    student_SD: torch.Tensor,
    teacher_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    student_spans: Spans,
    teacher_spans: Spans,
    weight_P: torch.Tensor,
    aligned_S: torch.Tensor | None = None,
) -> Distilled:
    """How far the student's normed states are from the teacher's, by spans and by tokens.

    For backward it keeps the states, not copied, and the pooled differences, fp32 (P, D).

    Args:
        student_SD: fp32, bf16 or fp16; the only argument that gets a gradient. D <= 16384.
        teacher_TD: The same dtype.
        norm_weight_D: Any of these dtypes, not rounded; frozen.
        student_spans: P spans, each the partner of the teacher's span of the same number.
        weight_P: fp32.
        aligned_S: int32, each student token's partner among the teacher's tokens, or -1. That it is
            below T is the caller's promise: to check it would ask the device.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or is not contiguous.

    Source: arXiv 2406.12739, section 3.
    """
    states = (student_SD, teacher_TD, norm_weight_D, eps)
    inputs = (*states, student_spans, teacher_spans, weight_P, aligned_S)
    check_inputs(*inputs)
    if torch.is_grad_enabled() and student_SD.requires_grad:
        return Distilled(*_DistillLoss.apply(*inputs))
    return _measure(*inputs, difference_PD=None)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_SD, teacher_TD, norm_weight_D, eps, student_spans, teacher_spans, weight_P,
        aligned_S,
    ):  # fmt: skip
        size = (len(weight_P), student_SD.shape[1])
        difference_PD = student_SD.new_empty(size, dtype=torch.float32)
        states = (student_SD, teacher_TD, norm_weight_D, eps)
        inputs = (*states, student_spans, teacher_spans, weight_P, aligned_S)
        distilled = _measure(*inputs, difference_PD=difference_PD)
        partners_TD = None if aligned_S is None else teacher_TD
        ctx.save_for_backward(
            student_SD, partners_TD, norm_weight_D, difference_PD, weight_P, aligned_S
        )
        ctx.eps, ctx.spans = eps, student_spans
        ctx.set_materialize_grads(False)
        _, token_error, moments = distilled
        constants = [moments] if aligned_S is not None else [moments, token_error]
        ctx.mark_non_differentiable(*constants)
        return tuple(distilled)

    @staticmethod
    @once_differentiable
    def backward(ctx, pooled_grad, token_grad, _):
        saved = ctx.saved_tensors
        return _student_grad(saved, ctx.eps, ctx.spans, pooled_grad, token_grad), *[None] * 7


def _measure(
    student_SD: torch.Tensor,
    teacher_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    student_spans: Spans,
    teacher_spans: Spans,
    weight_P: torch.Tensor,
    aligned_S: torch.Tensor | None,
    difference_PD: torch.Tensor | None,
) -> Distilled:
    """The outputs; fills the pooled differences where they are wanted."""
    width, device = student_SD.shape[1], student_SD.device
    block, warps, stages = _row_plan(width, student_SD.element_size())
    num_programs, share = _shares(len(student_SD) + len(teacher_TD), warps, device)
    # Joined at once
    pieces = min(max(triton.next_power_of_2(triton.cdiv(num_programs, len(weight_P))), 8), 32)
    num_blocks = triton.cdiv(width, TILE // pieces)
    blocks = triton.next_power_of_2(num_blocks)
    rows = triton.next_power_of_2(num_programs)
    new = functools.partial(torch.empty, device=device)
    # The span whose first cut is before this share, or -1
    cut_W = new(num_programs, dtype=torch.int32)
    # By program, whether the span starts in its share, side
    pieces_W22D = new(num_programs, 2, 2, width)
    columns_WD = new(num_programs, width)
    sums_5W = new(5, num_programs, dtype=torch.float64)
    cut_sums_4WJ = new(4, num_programs, num_blocks)
    moments, pooled_error, token_error = new(4 + width, dtype=torch.float64), new(()), new(())
    bounds = (student_spans.bounds_P2, teacher_spans.bounds_P2)
    sizes = (len(weight_P), len(student_SD), share, width)
    walk_kernel[(num_programs,)](
        student_SD, teacher_TD, norm_weight_D, *bounds, weight_P, aligned_S, difference_PD,
        cut_W, pieces_W22D, columns_WD, sums_5W, *sizes, eps,
        BLOCK_D=block, PARK_D=4096 if block > 8192 else 0, SEARCH=32 * warps, STAGES=stages,
        num_warps=warps, maxnreg=128,
    )  # fmt: skip
    join_kernel[(num_programs, num_blocks)](
        norm_weight_D, *bounds, difference_PD, cut_W, pieces_W22D, cut_sums_4WJ, *sizes,
        ALIGNED=aligned_S is not None, ROWS=pieces, BLOCK_D=TILE // pieces, num_warps=4,
    )  # fmt: skip
    total_kernel[(1 + triton.cdiv(width, 64),)](
        norm_weight_D, weight_P, cut_W, columns_WD, sums_5W, cut_sums_4WJ,
        moments, pooled_error, token_error, num_programs, num_blocks, width,
        BLOCK_W=rows, ROWS=min(rows, TILE // blocks), BLOCK_J=blocks, BLOCK_D=64, num_warps=8,
    )  # fmt: skip
    return Distilled(pooled_error, token_error, moments)


def _student_grad(
    saved: tuple[torch.Tensor | None, ...],
    eps: float,
    spans: Spans,
    pooled_grad: torch.Tensor | None,
    token_grad: torch.Tensor | None,
) -> torch.Tensor:
    student_SD, partners_TD, norm_weight_D, difference_PD, weight_P, aligned_S = saved
    width = student_SD.shape[1]
    block, warps, stages = _row_plan(width, student_SD.element_size())
    num_chunks = len(spans.chunks_C3)
    # Few long chunks would leave some processors idle
    splits = 1 if num_chunks >= 8 * _num_processors(student_SD.device) else 4
    pooled_grad, token_grad = (
        weight_P.new_zeros(()) if grad is None else grad for grad in (pooled_grad, token_grad)
    )
    gradient_SD = torch.empty_like(student_SD)
    _backward_kernel[(num_chunks, splits)](
        student_SD, partners_TD, norm_weight_D, spans.bounds_P2, spans.chunks_C3, weight_P,
        aligned_S, difference_PD, pooled_grad, token_grad, gradient_SD, width, eps,
        ROWS=CHUNK // splits, BLOCK_D=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return gradient_SD


def _row_plan(width: int, element_size: int) -> tuple[int, int, int]:
    """Block, warps and stages of a loop over rows.

    8 to 32 channels a thread, two or three rows on their way.
    """
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 8 if block <= 4096 else 16)
    return block, warps, 4 if block * element_size <= 16384 else 3


def _shares(num_tokens: int, warps: int, device: torch.device) -> tuple[int, int]:
    """Programs, as many as run at once (16 warps of 128 registers), and merged tokens of each."""
    at_once = _num_processors(device) * (16 // warps)
    share = triton.cdiv(num_tokens, min(at_once, triton.cdiv(num_tokens, MIN_SHARE)))
    return triton.cdiv(num_tokens, share), share


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Multiprocessors; where there are none, an H100's.

    But few on CPU, for the interpreter: yet so many that spans are cut into more pieces than are
    joined at once.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if device.type == "cpu" else 132


@triton.jit
def _backward_kernel(
    student_SD, partners_TD, norm_weight_D, student_P2, chunks_C3, weight_P, aligned_S,
    difference_PD, pooled_grad, token_grad, gradient_SD, width, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of up to ROWS tokens of one chunk: dx = r * (g - x * r^2 * mean(g x)).

    With g = dloss/dy * norm weight and r = 1 / rms(x); zeros for tokens in no span and without a
    partner.
    """
    chunk = chunks_C3 + 3 * tl.program_id(0)
    span = tl.load(chunk)
    row = tl.load(chunk + 1) + tl.program_id(1) * ROWS
    stop = tl.minimum(row + ROWS, tl.load(chunk + 2))
    if row >= stop:
        return
    channel, is_pooled = tl.arange(0, BLOCK_D), span >= 0
    inside = channel < width
    start = tl.load(student_P2 + 2 * span, mask=is_pooled, other=0)
    length = tl.load(student_P2 + 2 * span + 1, mask=is_pooled, other=1) - start
    factor = 2.0 * tl.load(pooled_grad)
    factor = factor * tl.load(weight_P + span, mask=is_pooled, other=0.0) / length
    scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0).to(tl.float32)
    pooled_D = factor * scale_D * load_row(difference_PD, span, width, channel, is_pooled)
    if aligned_S is not None:
        square_D = 2.0 * tl.load(token_grad) * scale_D * scale_D
    for token in tl.range(row, stop, num_stages=STAGES if aligned_S is None else STAGES - 1):
        g_D, is_live = pooled_D, is_pooled
        if aligned_S is not None:
            partner = tl.load(aligned_S + token)
            is_live = is_pooled | (partner >= 0)
        position = tl.cast(token, tl.int64) * width + channel
        live = channel < tl.where(is_live, width, 0)
        x_D = tl.load(student_SD + position, mask=live, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_D * x_D) / width + eps)
        if aligned_S is not None:
            partner_D = load_row(partners_TD, partner, width, channel, partner >= 0)
            error_D = x_D * rstd - partner_D * rstd_of(partner_D, eps, width)
            g_D += tl.where(partner >= 0, square_D * error_D, 0.0)
        dx_D = rstd * (g_D - x_D * (rstd * rstd * tl.sum(g_D * x_D) / width))
        dx_D = tl.where(is_live, dx_D, 0.0)
        tl.store(gradient_SD + position, dx_D.to(gradient_SD.dtype.element_ty), mask=inside)
