"""distill_loss in Triton: each state is read once forward and once backward, however long or short the spans are.

Forward, the spans' tokens are merged into one stream - the student's tokens of span 0, the teacher's of span 0, the
student's of span 1, ... - of which every program takes an equal share, at the merged positions that need no table:
student token i of span p stands at i + teacher_start_p, teacher token j of it at student_end_p + j. So a program sees
whole short spans, both sides of them, and compares them in registers; of a span that shares cut, each program leaves
its sums, and `_join_kernel` adds them up in order. Nothing is added atomically: results are the same every time.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .checks import check_inputs
from .reference import Distilled
from .spans import CHUNK, Spans

MIN_SHARE = 16  # merged tokens: for fewer, another program is not worth its sums
JOIN_D = 128  # channels of a program that joins cut spans


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
    """How far the student's normed states are from the teacher's, pooled over spans and token by token.

    For backward it keeps the states, not copied, and the pooled differences, fp32 (P, D).

    Args:
        student_SD: fp32, bf16 or fp16; the only argument that gets a gradient. D <= 16384.
        teacher_TD: The same dtype.
        norm_weight_D: Any of these dtypes; frozen.
        student_spans: P spans, each the partner of the teacher's span of the same number.
        weight_P: fp32.
        aligned_S: int32, each student token's partner among the teacher's tokens, or -1. That it is below T is the
            caller's promise: to check it would ask the device.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or is not contiguous.

    Source: arXiv 2406.12739, section 3.
    """
    inputs = (student_SD, teacher_TD, norm_weight_D, eps, student_spans, teacher_spans, weight_P, aligned_S)
    check_inputs(*inputs)
    if torch.is_grad_enabled() and student_SD.requires_grad:
        return Distilled(*_DistillLoss.apply(*inputs))
    return _measure(*inputs, difference_PD=None)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_SD, teacher_TD, norm_weight_D, eps, student_spans, teacher_spans, weight_P, aligned_S):
        difference_PD = student_SD.new_empty(len(weight_P), student_SD.shape[1], dtype=torch.float32)
        inputs = (student_SD, teacher_TD, norm_weight_D, eps, student_spans, teacher_spans, weight_P, aligned_S)
        distilled = _measure(*inputs, difference_PD=difference_PD)
        partners_TD = None if aligned_S is None else teacher_TD
        ctx.save_for_backward(student_SD, partners_TD, norm_weight_D, difference_PD, weight_P, aligned_S)
        ctx.eps, ctx.spans = eps, student_spans
        ctx.set_materialize_grads(False)
        constants = [distilled.moments] if aligned_S is not None else [distilled.moments, distilled.token_error]
        ctx.mark_non_differentiable(*constants)
        return tuple(distilled)

    @staticmethod
    @once_differentiable
    def backward(ctx, pooled_grad, token_grad, _):
        return _student_grad(ctx.saved_tensors, ctx.eps, ctx.spans, pooled_grad, token_grad), *[None] * 7


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
    num_blocks = triton.cdiv(width, JOIN_D)
    new = functools.partial(torch.empty, device=device)
    cut_G = new(num_programs, dtype=torch.int32)  # the span whose first cut is before this share, or -1
    pieces_G22D = new(num_programs, 2, 2, width)  # by program, whether the span starts in its share, side
    columns_GD = new(num_programs, width)
    sums_5G = new(5, num_programs, dtype=torch.float64)
    cut_sums_4GB = new(4, num_programs, num_blocks)
    moments, pooled_error, token_error = new(4 + width, dtype=torch.float64), new(()), new(())
    bounds = (student_spans.bounds_P2, teacher_spans.bounds_P2)
    sizes = (len(weight_P), len(student_SD), share, width)
    _walk_kernel[(num_programs,)](
        student_SD, teacher_TD, norm_weight_D, *bounds, weight_P, aligned_S, difference_PD,
        cut_G, pieces_G22D, columns_GD, sums_5G, *sizes, eps,
        BLOCK_D=block, PARK_D=4096 if block > 8192 else 0, SEARCH=32 * warps, STAGES=stages,
        num_warps=warps, maxnreg=128,
    )  # fmt: skip
    _join_kernel[(num_programs, num_blocks)](
        norm_weight_D, *bounds, difference_PD, cut_G, pieces_G22D, cut_sums_4GB, *sizes,
        ALIGNED=aligned_S is not None, ROWS=32, BLOCK_D=JOIN_D, num_warps=4,
    )  # fmt: skip
    _total_kernel[(1 + triton.cdiv(width, 64),)](
        norm_weight_D, weight_P, cut_G, columns_GD, sums_5G, cut_sums_4GB, moments, pooled_error, token_error,
        num_programs, num_blocks, width,
        BLOCK_G=triton.next_power_of_2(num_programs), BLOCK_B=triton.next_power_of_2(num_blocks), BLOCK_D=64,
        num_warps=4,
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
    splits = 1 if num_chunks >= 8 * _num_processors(student_SD.device) else 4  # few long chunks would leave some idle
    pooled_grad, token_grad = (weight_P.new_zeros(()) if grad is None else grad for grad in (pooled_grad, token_grad))
    gradient_SD = torch.empty_like(student_SD)
    _backward_kernel[(num_chunks, splits)](
        student_SD, partners_TD, norm_weight_D, spans.bounds_P2, spans.chunks_C3, weight_P, aligned_S, difference_PD,
        pooled_grad, token_grad, gradient_SD, width, eps,
        ROWS=CHUNK // splits, BLOCK_D=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return gradient_SD


def _row_plan(width: int, element_size: int) -> tuple[int, int, int]:
    """Block, warps and stages of a loop over rows: 8 to 32 channels a thread, two or three rows on their way."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 8 if block <= 4096 else 16), 4 if block * element_size <= 16384 else 3


def _shares(num_tokens: int, warps: int, device: torch.device) -> tuple[int, int]:
    """Programs, and merged tokens of each: as many as run at once, 16 warps of 128 registers a multiprocessor."""
    at_once = _num_processors(device) * (16 // warps)
    share = triton.cdiv(num_tokens, min(at_once, triton.cdiv(num_tokens, MIN_SHARE)))
    return triton.cdiv(num_tokens, share), share


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Multiprocessors; on CPU, under the interpreter, as many as let spans be cut into more pieces than are joined at
    once.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit(do_not_specialize=["num_spans", "num_student", "share"])
def _walk_kernel(
    student_SD, teacher_TD, norm_weight_D, student_P2, teacher_P2, weight_P, aligned_S, difference_PD,
    cut_G, pieces_G22D, columns_GD, sums_5G,
    num_spans, num_student, share, width, eps,
    BLOCK_D: tl.constexpr, PARK_D: tl.constexpr, SEARCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Goes through one share of the merged stream: spans wholly in it are done, of the others it leaves the sums.

    Rows of more than 8,192 channels leave no registers for a second row of sums: there the sums are parked in memory
    and compared in blocks of PARK_D channels.
    """
    program = tl.program_id(0)
    low, high = program * share, (program + 1) * share
    first = tl.maximum(_count_before(student_P2, teacher_P2, num_spans, low + 1, SEARCH) - 1, 0)
    last = tl.maximum(_count_before(student_P2, teacher_P2, num_spans, high, SEARCH), 1)
    channel = tl.arange(0, BLOCK_D)
    columns = columns_GD + program * width
    column_D = tl.zeros((BLOCK_D,), tl.float32)
    if PARK_D:
        tl.store(columns + channel, column_D, mask=channel < width)
    tl.store(cut_G + program, -1)
    zero = tl.full((), 0.0, tl.float64)
    weights, errors, cosines, norms, token = zero, zero, zero, zero, 0.0
    for span in range(first, last):
        begin, end, student_start, student_end, teacher_start, teacher_end = _bounds(
            student_P2, teacher_P2, span, num_spans, num_student, aligned_S is not None
        )
        opening, closing = begin + teacher_start, end + teacher_end
        is_whole = (opening >= low) & (closing <= high)
        piece = pieces_G22D + (2 * program + (opening >= low).to(tl.int32)) * 2 * width
        row, stop = tl.maximum(begin, low - teacher_start), tl.minimum(end, high - teacher_start)
        if aligned_S is None:
            student_D = _sum_rows(student_SD, row, stop, eps, width, channel, STAGES)
        else:
            student_D, token = _sum_aligned(
                student_SD, teacher_TD, norm_weight_D, aligned_S, row, stop, student_start, student_end, token,
                eps, width, channel, STAGES - 1,
            )  # fmt: skip
        if PARK_D or not is_whole:
            _store_row(piece, student_D, channel, width, row < stop)
        row, stop = tl.maximum(teacher_start, low - end), tl.minimum(teacher_end, high - end)
        teacher_D = _sum_rows(teacher_TD, row, stop, eps, width, channel, STAGES)
        if PARK_D or not is_whole:
            _store_row(piece + width, teacher_D, channel, width, row < stop)
        weight = tl.load(weight_P + span)
        student_scale, teacher_scale = 1.0 / (student_end - student_start), 1.0 / (teacher_end - teacher_start)
        if PARK_D:
            error, product, student_norm, norm = _compare_parked(
                piece, columns, weight * teacher_scale, row < stop, is_whole,
                norm_weight_D, difference_PD, span, width, student_scale, teacher_scale, PARK_D,
            )  # fmt: skip
        else:
            column_D += teacher_D * (weight * teacher_scale)
            error, product, student_norm, norm = 0.0, 0.0, 0.0, 0.0
            if is_whole:
                error, product, student_norm, norm = _compare(
                    student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel,
                    student_scale, teacher_scale,
                )  # fmt: skip
        if is_whole:
            weights += weight
            errors += weight * error
            cosines += weight * _cosine(product, student_norm, norm)
            norms += weight * norm
        elif (opening // share == program - 1) & (closing > low):
            tl.store(cut_G + program, span)
    if not PARK_D:
        tl.store(columns + channel, column_D, mask=channel < width)
    sums, stride = sums_5G + program, tl.num_programs(0)
    tl.store(sums, weights)
    tl.store(sums + stride, errors)
    tl.store(sums + 2 * stride, cosines)
    tl.store(sums + 3 * stride, norms)
    tl.store(sums + 4 * stride, token)


@triton.jit
def _count_before(student_P2, teacher_P2, num_spans, position, SEARCH: tl.constexpr):
    """How many spans start before a position of the merged stream: SEARCH probes at once, two rounds for 65,536."""
    low, high = 0, num_spans
    while low < high:
        step = tl.cdiv(high - low, SEARCH)
        probe = low + tl.arange(0, SEARCH) * step
        valid = probe < high
        student_start = tl.load(student_P2 + 2 * probe, mask=valid, other=0)
        teacher_start = tl.load(teacher_P2 + 2 * probe, mask=valid, other=0)
        before = tl.sum((valid & (student_start + teacher_start < position)).to(tl.int32))
        high = tl.where(before > 0, tl.minimum(low + before * step, high), low)
        low = tl.where(before > 0, low + (before - 1) * step + 1, low)
    return low


@triton.jit
def _bounds(student_P2, teacher_P2, span, num_spans, num_student, ALIGNED: tl.constexpr):
    """What a span owns of the student's tokens, then its bounds: with partners also tokens outside all spans count,
    so each span owns those behind it, and the first those before it too.
    """
    student_start, student_end = tl.load(student_P2 + 2 * span), tl.load(student_P2 + 2 * span + 1)
    teacher_start, teacher_end = tl.load(teacher_P2 + 2 * span), tl.load(teacher_P2 + 2 * span + 1)
    begin, end = student_start, student_end
    if ALIGNED:
        begin = tl.where(span == 0, 0, student_start)
        end = tl.load(student_P2 + 2 * span + 2, mask=span + 1 < num_spans, other=num_student)
    return begin, end, student_start, student_end, teacher_start, teacher_end


@triton.jit
def _sum_rows(states_SD, row, stop, eps, width, channel, STAGES: tl.constexpr):
    """The sum of normalised rows, before the norm's weight."""
    sum_D = tl.zeros_like(channel).to(tl.float32)
    for token in tl.range(row, stop, num_stages=STAGES):
        x = states_SD + tl.cast(token, tl.int64) * width + channel
        x_D = tl.load(x, mask=channel < width, other=0.0).to(tl.float32)
        sum_D += x_D * tl.rsqrt(tl.sum(x_D * x_D) / width + eps)
    return sum_D


@triton.jit
def _sum_aligned(
    student_SD, teacher_TD, norm_weight_D, aligned_S, row, stop, start, end, error, eps, width, channel,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same of the rows in [start, end); adds the squared errors of all rows with a partner to `error`."""
    sum_D = tl.zeros_like(channel).to(tl.float32)
    scale_D = tl.load(norm_weight_D + channel, mask=channel < width, other=0.0).to(tl.float32)
    for token in tl.range(row, stop, num_stages=STAGES):
        partner = tl.load(aligned_S + token)
        is_pooled, is_paired = (token >= start) & (token < end), partner >= 0
        x_D = _load_row(student_SD, token, width, channel, is_pooled | is_paired)
        partner_D = _load_row(teacher_TD, partner, width, channel, is_paired)
        x_D *= _rstd(x_D, eps, width)
        sum_D += tl.where(is_pooled, x_D, 0.0)
        error_D = (x_D - partner_D * _rstd(partner_D, eps, width)) * scale_D
        error += tl.where(is_paired, tl.sum(error_D * error_D), 0.0)
    return sum_D, error


@triton.jit
def _load_row(states_SD, row, width, channel, wanted):
    """A row in fp32, or zeros. A scalar condition is a limit here: the interpreter's `&` of a block and one is no mask."""
    mask = channel < tl.where(wanted, width, 0)
    return tl.load(states_SD + tl.cast(row, tl.int64) * width + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(piece, sum_D, channel, width, wanted):
    tl.store(piece + channel, sum_D, mask=channel < tl.where(wanted, width, 0))


@triton.jit
def _rstd(x_D, eps, width):
    return tl.rsqrt(tl.sum(x_D * x_D) / width + eps)


@triton.jit
def _compare(
    student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel, student_scale, teacher_scale
):  # fmt: skip
    """Makes means of sums, keeps their difference if wanted; squared difference, product, both squared norms out."""
    inside = channel < width
    scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0).to(tl.float32)
    student_D *= scale_D * student_scale
    teacher_D *= scale_D * teacher_scale
    difference_D = student_D - teacher_D
    if difference_PD is not None:
        tl.store(difference_PD + tl.cast(span, tl.int64) * width + channel, difference_D, mask=inside)
    error, product = tl.sum(difference_D * difference_D), tl.sum(student_D * teacher_D)
    return error, product, tl.sum(student_D * student_D), tl.sum(teacher_D * teacher_D)


@triton.jit
def _compare_parked(
    piece, columns, column_scale, has_teacher, is_whole,
    norm_weight_D, difference_PD, span, width, student_scale, teacher_scale, PARK_D: tl.constexpr,
):  # fmt: skip
    """`_compare` of the sums in memory, if the span is whole; adds the teacher's to the columns in either case."""
    tl.debug_barrier()  # the blocks' threads are not those that parked them
    error, product, student_norm, norm = 0.0, 0.0, 0.0, 0.0
    for base in range(0, width, PARK_D):
        channel = base + tl.arange(0, PARK_D)
        inside = channel < width
        teacher_D = _load_row(piece, 1, width, channel, has_teacher)
        column_D = tl.load(columns + channel, mask=inside, other=0.0)
        tl.store(columns + channel, column_D + column_scale * teacher_D, mask=inside)
        if is_whole:
            student_D = _load_row(piece, 0, width, channel, True)
            block_error, block_product, block_student_norm, block_norm = _compare(
                student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel, student_scale, teacher_scale
            )
            error += block_error
            product += block_product
            student_norm += block_student_norm
            norm += block_norm
    tl.debug_barrier()
    return error, product, student_norm, norm


@triton.jit
def _cosine(product, student_norm, norm):
    return product / (tl.maximum(tl.sqrt(student_norm), 1e-8) * tl.maximum(tl.sqrt(norm), 1e-8))


@triton.jit(do_not_specialize=["num_spans", "num_student", "share"])
def _join_kernel(
    norm_weight_D, student_P2, teacher_P2, difference_PD, cut_G, pieces_G22D, cut_sums_4GB,
    num_spans, num_student, share, width,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """If the first cut of a span is before this program's share: one block of the span's channels, from its pieces."""
    program, block = tl.program_id(0), tl.program_id(1)
    span = tl.load(cut_G + program)
    if span < 0:
        return
    begin, end, student_start, student_end, teacher_start, teacher_end = _bounds(
        student_P2, teacher_P2, span, num_spans, num_student, ALIGNED
    )
    opener, middle = program - 1, end + teacher_start  # where the student's tokens end, and the teacher's start
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    student_D = _join(pieces_G22D, opener, opener, (middle - 1) // share, width, channel, ROWS)
    teacher_last = (end + teacher_end - 1) // share
    teacher_D = _join(pieces_G22D + width, opener, middle // share, teacher_last, width, channel, ROWS)
    error, product, student_norm, norm = _compare(
        student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel,
        1.0 / (student_end - student_start), 1.0 / (teacher_end - teacher_start),
    )  # fmt: skip
    sums = cut_sums_4GB + program * tl.num_programs(1) + block
    stride = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums, error)
    tl.store(sums + stride, product)
    tl.store(sums + 2 * stride, student_norm)
    tl.store(sums + 3 * stride, norm)


@triton.jit
def _join(pieces_G22D, opener, first, last, width, channel, ROWS: tl.constexpr):
    """The sum over programs first to last of a span's pieces; the opener's lies where spans that start do."""
    sum_RD = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    for base in tl.range(first, last + 1, ROWS, num_stages=3):
        program = base + tl.arange(0, ROWS)
        row = (2 * program + (program == opener).to(tl.int32)) * 2
        mask = (program <= last)[:, None] & (channel < width)[None, :]
        sum_RD += tl.load(pieces_G22D + row[:, None] * width + channel[None, :], mask=mask, other=0.0)
    return tl.sum(sum_RD, axis=0)


@triton.jit(do_not_specialize=["num_programs"])
def _total_kernel(
    norm_weight_D, weight_P, cut_G, columns_GD, sums_5G, cut_sums_4GB, moments, pooled_error, token_error,
    num_programs, num_blocks, width,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up all programs' sums in fp64: program 0 the scalars, the others a block of the teacher's columns each."""
    if tl.program_id(0) == 0:
        _total_scalars(
            weight_P, cut_G, sums_5G, cut_sums_4GB, moments, pooled_error, token_error, num_programs, num_blocks,
            BLOCK_G, BLOCK_B,
        )  # fmt: skip
    else:
        channel = (tl.program_id(0) - 1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = channel < width
        sum_RD = tl.zeros((32, BLOCK_D), tl.float64)
        for base in tl.range(0, num_programs, 32, num_stages=3):
            program = base + tl.arange(0, 32)
            mask = (program < num_programs)[:, None] & inside[None, :]
            columns_RD = tl.load(columns_GD + program[:, None] * width + channel[None, :], mask=mask, other=0.0)
            sum_RD += columns_RD.to(tl.float64)
        scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        tl.store(moments + 4 + channel, tl.sum(sum_RD, axis=0) * scale_D, mask=inside)


@triton.jit
def _total_scalars(
    weight_P, cut_G, sums_5G, cut_sums_4GB, moments, pooled_error, token_error, num_programs, num_blocks,
    BLOCK_G: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    weights = _sum_programs(sums_5G, num_programs, BLOCK_G)
    errors = _sum_programs(sums_5G + num_programs, num_programs, BLOCK_G)
    cosines = _sum_programs(sums_5G + 2 * num_programs, num_programs, BLOCK_G)
    norms = _sum_programs(sums_5G + 3 * num_programs, num_programs, BLOCK_G)
    stride, rows = num_programs * num_blocks, tl.arange(0, 16)
    for base in range(0, num_programs, 16):
        program = base + rows
        span = tl.load(cut_G + program, mask=program < num_programs, other=-1)
        weight = tl.load(weight_P + span, mask=span >= 0, other=0.0).to(tl.float64)
        sums = cut_sums_4GB + program * num_blocks
        error = _sum_blocks(sums, span >= 0, num_blocks, BLOCK_B)
        product = _sum_blocks(sums + stride, span >= 0, num_blocks, BLOCK_B)
        student_norm = _sum_blocks(sums + 2 * stride, span >= 0, num_blocks, BLOCK_B)
        norm = _sum_blocks(sums + 3 * stride, span >= 0, num_blocks, BLOCK_B)
        weights += tl.sum(weight)
        errors += tl.sum(weight * error)
        cosines += tl.sum(weight * _cosine(product, student_norm, norm))
        norms += tl.sum(weight * norm)
    tl.store(moments, weights)
    tl.store(moments + 1, errors)
    tl.store(moments + 2, cosines)
    tl.store(moments + 3, norms)
    tl.store(pooled_error, errors.to(tl.float32))
    tl.store(token_error, _sum_programs(sums_5G + 4 * num_programs, num_programs, BLOCK_G).to(tl.float32))


@triton.jit
def _sum_programs(sums_G, num_programs, BLOCK_G: tl.constexpr):
    program = tl.arange(0, BLOCK_G)
    return tl.sum(tl.load(sums_G + program, mask=program < num_programs, other=0.0))


@triton.jit
def _sum_blocks(sums_R, valid_R, num_blocks, BLOCK_B: tl.constexpr):
    block = tl.arange(0, BLOCK_B)
    mask = valid_R[:, None] & (block < num_blocks)[None, :]
    return tl.sum(tl.load(sums_R[:, None] + block[None, :], mask=mask, other=0.0).to(tl.float64), axis=1)


@triton.jit
def _backward_kernel(
    student_SD, partners_TD, norm_weight_D, student_P2, chunks_C3, weight_P, aligned_S, difference_PD,
    pooled_grad, token_grad, gradient_SD, width, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of up to ROWS tokens of one chunk: with g = dloss/dy * norm weight and r = 1 / rms(x),
    dx = r * (g - x * r^2 * mean(g x)); zeros for tokens in no span and without a partner.
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
    factor = 2.0 * tl.load(pooled_grad) * tl.load(weight_P + span, mask=is_pooled, other=0.0) / length
    scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0).to(tl.float32)
    pooled_D = factor * scale_D * _load_row(difference_PD, span, width, channel, is_pooled)
    if aligned_S is not None:
        square_D = 2.0 * tl.load(token_grad) * scale_D * scale_D
    for token in tl.range(row, stop, num_stages=STAGES if aligned_S is None else STAGES - 1):
        g_D, is_live = pooled_D, is_pooled
        if aligned_S is not None:
            partner = tl.load(aligned_S + token)
            is_live = is_pooled | (partner >= 0)
        position = tl.cast(token, tl.int64) * width + channel
        x_D = tl.load(student_SD + position, mask=channel < tl.where(is_live, width, 0), other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_D * x_D) / width + eps)
        if aligned_S is not None:
            partner_D = _load_row(partners_TD, partner, width, channel, partner >= 0)
            error_D = x_D * rstd - partner_D * _rstd(partner_D, eps, width)
            g_D += tl.where(partner >= 0, square_D * error_D, 0.0)
        dx_D = tl.where(is_live, rstd * (g_D - x_D * (rstd * rstd * tl.sum(g_D * x_D) / width)), 0.0)
        tl.store(gradient_SD + position, dx_D.to(gradient_SD.dtype.element_ty), mask=inside)
