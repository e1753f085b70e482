"""The kernels of distill_loss's forward: programs that share all tokens equally pool the spans.

Both sides' tokens are merged into one stream - the student's of span 0, the teacher's of span 0,
the student's of span 1, ... - at positions that need no table: the student's token i of a span
stands at i + teacher_start, the teacher's token j at student_end + j. Each program of `walk_kernel`
takes an equal share of the stream. It sees whole short spans, both sides of them, and compares them
in registers; of a span that the shares cut, each program leaves the sum of its rows, a piece, and
`join_kernel` adds these up. `total_kernel` adds up what all programs found. Nothing is added
atomically: the same arguments give the same bits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_spans", "num_student", "share"])
def walk_kernel(
    student_SD, teacher_TD, norm_weight_D, student_P2, teacher_P2, weight_P, aligned_S,
    difference_PD, cut_W, pieces_W22D, columns_WD, sums_5W,
    num_spans, num_student, share, width, eps,
    BLOCK_D: tl.constexpr, PARK_D: tl.constexpr, SEARCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Goes through one share of the stream: finishes spans wholly in it, leaves the others' sums.

    Rows of more than 8,192 channels leave no registers for a second row of sums: there the sums are
    parked in memory and compared in blocks of PARK_D channels.
    """
    program = tl.program_id(0)
    low, high = program * share, (program + 1) * share
    first = tl.maximum(_count_before(student_P2, teacher_P2, num_spans, low + 1, SEARCH) - 1, 0)
    last = tl.maximum(_count_before(student_P2, teacher_P2, num_spans, high, SEARCH), 1)
    channel = tl.arange(0, BLOCK_D)
    columns = columns_WD + program * width
    column_D = tl.zeros((BLOCK_D,), tl.float32)
    if PARK_D:
        tl.store(columns + channel, column_D, mask=channel < width)
    tl.store(cut_W + program, -1)
    zero = tl.full((), 0.0, tl.float64)
    weights, errors, cosines, norms, token_error = zero, zero, zero, zero, 0.0
    for span in range(first, last):
        begin, end, student_start, student_end, teacher_start, teacher_end = _bounds(
            student_P2, teacher_P2, span, num_spans, num_student, aligned_S is not None
        )
        opening, closing = begin + teacher_start, end + teacher_end
        is_whole = (opening >= low) & (closing <= high)
        piece = pieces_W22D + (2 * program + (opening >= low).to(tl.int32)) * 2 * width
        row, stop = tl.maximum(begin, low - teacher_start), tl.minimum(end, high - teacher_start)
        student_D, token_error = _sum_student(
            student_SD, teacher_TD, norm_weight_D, aligned_S, row, stop,
            student_start, student_end, token_error, eps, width, channel, STAGES,
        )  # fmt: skip
        if PARK_D or not is_whole:
            _store_row(piece, student_D, channel, width, row < stop)
        row, stop = tl.maximum(teacher_start, low - end), tl.minimum(teacher_end, high - end)
        teacher_D = _sum_rows(teacher_TD, row, stop, eps, width, channel, STAGES)
        if PARK_D or not is_whole:
            _store_row(piece + width, teacher_D, channel, width, row < stop)
        weight = tl.load(weight_P + span)
        student_scale = 1.0 / (student_end - student_start)
        teacher_scale = 1.0 / (teacher_end - teacher_start)
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
        # Its first cut is before this share
        elif (opening // share == program - 1) & (closing > low):
            tl.store(cut_W + program, span)
    if not PARK_D:
        tl.store(columns + channel, column_D, mask=channel < width)
    sums, stride = sums_5W + program, tl.num_programs(0)
    _store_four(sums, stride, weights, errors, cosines, norms)
    tl.store(sums + 4 * stride, token_error)


@triton.jit
def _count_before(student_P2, teacher_P2, num_spans, position, SEARCH: tl.constexpr):
    """How many spans start before a position of the merged stream.

    SEARCH probes at once, two rounds for 65,536.
    """
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
    """What a span owns of the student's tokens, then its bounds.

    With partners also tokens outside all spans count, so each span owns those behind it, and the
    first those before it too.
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
    """The sum of normalised rows, before the norm's weight.

    Calls would cost the interpreter more than the rest.
    """
    sum_D, inside = tl.zeros_like(channel).to(tl.float32), channel < width
    states = states_SD + channel
    for token in tl.range(row, stop, num_stages=STAGES):
        row_D = states + tl.cast(token, tl.int64) * width
        x_D = tl.load(row_D, mask=inside, other=0.0).to(tl.float32)
        sum_D += x_D * tl.rsqrt(tl.sum(x_D * x_D) / width + eps)
    return sum_D


@triton.jit
def _sum_student(
    student_SD, teacher_TD, norm_weight_D, aligned_S, row, stop,
    start, end, error, eps, width, channel, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of the rows in [start, end), and `error` with those of all rows with a partner."""
    if aligned_S is None:
        sum_D = _sum_rows(student_SD, row, stop, eps, width, channel, STAGES)
    else:
        sum_D = tl.zeros_like(channel).to(tl.float32)
        scale_D = tl.load(norm_weight_D + channel, mask=channel < width, other=0.0).to(tl.float32)
        for token in tl.range(row, stop, num_stages=STAGES - 1):  # of two rows
            partner = tl.load(aligned_S + token)
            is_pooled, is_paired = (token >= start) & (token < end), partner >= 0
            x_D = load_row(student_SD, token, width, channel, is_pooled | is_paired)
            partner_D = load_row(teacher_TD, partner, width, channel, is_paired)
            x_D *= rstd_of(x_D, eps, width)
            sum_D += tl.where(is_pooled, x_D, 0.0)
            error_D = (x_D - partner_D * rstd_of(partner_D, eps, width)) * scale_D
            error += tl.where(is_paired, tl.sum(error_D * error_D), 0.0)
    return sum_D, error


@triton.jit
def load_row(states_SD, row, width, channel, wanted):
    """A row in fp32, or zeros."""
    # A limit, not `&`: in the interpreter that of a block and a scalar is no mask
    mask = channel < tl.where(wanted, width, 0)
    row_D = states_SD + tl.cast(row, tl.int64) * width + channel
    return tl.load(row_D, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(piece, sum_D, channel, width, wanted):
    tl.store(piece + channel, sum_D, mask=channel < tl.where(wanted, width, 0))


@triton.jit
def _store_four(at, stride, a, b, c, d):
    tl.store(at, a)
    tl.store(at + stride, b)
    tl.store(at + 2 * stride, c)
    tl.store(at + 3 * stride, d)


@triton.jit
def rstd_of(x_D, eps, width):
    return tl.rsqrt(tl.sum(x_D * x_D) / width + eps)


@triton.jit
def _compare(
    student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel,
    student_scale, teacher_scale,
):  # fmt: skip
    """Of the means, from sums: squared difference, product, both squared norms.

    The difference itself is kept if wanted.
    """
    inside = channel < width
    scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0).to(tl.float32)
    student_D *= scale_D * student_scale
    teacher_D *= scale_D * teacher_scale
    difference_D = student_D - teacher_D
    if difference_PD is not None:
        kept_D = difference_PD + tl.cast(span, tl.int64) * width + channel
        tl.store(kept_D, difference_D, mask=inside)
    error, product = tl.sum(difference_D * difference_D), tl.sum(student_D * teacher_D)
    return error, product, tl.sum(student_D * student_D), tl.sum(teacher_D * teacher_D)


@triton.jit
def _compare_parked(
    piece, columns, column_scale, has_teacher, is_whole,
    norm_weight_D, difference_PD, span, width, student_scale, teacher_scale, PARK_D: tl.constexpr,
):  # fmt: skip
    """`_compare` of sums in memory, if the span is whole; the columns get the teacher's anyway."""
    tl.debug_barrier()  # the blocks' threads are not those that parked them
    error, product, student_norm, norm = 0.0, 0.0, 0.0, 0.0
    for base in range(0, width, PARK_D):
        channel = base + tl.arange(0, PARK_D)
        inside = channel < width
        teacher_D = load_row(piece, 1, width, channel, has_teacher)
        column_D = tl.load(columns + channel, mask=inside, other=0.0)
        tl.store(columns + channel, column_D + column_scale * teacher_D, mask=inside)
        if is_whole:
            student_D = load_row(piece, 0, width, channel, True)
            block_error, block_product, block_student_norm, block_norm = _compare(
                student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel,
                student_scale, teacher_scale,
            )  # fmt: skip
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
def join_kernel(
    norm_weight_D, student_P2, teacher_P2, difference_PD, cut_W, pieces_W22D, cut_sums_4WJ,
    num_spans, num_student, share, width,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of a span's channels from its pieces, if its first cut is before this share."""
    program, block = tl.program_id(0), tl.program_id(1)
    span = tl.load(cut_W + program)
    if span < 0:
        return
    begin, end, student_start, student_end, teacher_start, teacher_end = _bounds(
        student_P2, teacher_P2, span, num_spans, num_student, ALIGNED
    )
    opener = program - 1
    middle = end + teacher_start  # where the student's tokens end, and the teacher's start
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    student_D = _join(pieces_W22D, opener, opener, (middle - 1) // share, width, channel, ROWS)
    teacher_last = (end + teacher_end - 1) // share
    teacher_D = _join(
        pieces_W22D + width, opener, middle // share, teacher_last, width, channel, ROWS
    )
    error, product, student_norm, norm = _compare(
        student_D, teacher_D, norm_weight_D, difference_PD, span, width, channel,
        1.0 / (student_end - student_start), 1.0 / (teacher_end - teacher_start),
    )  # fmt: skip
    sums = cut_sums_4WJ + program * tl.num_programs(1) + block
    stride = tl.num_programs(0) * tl.num_programs(1)
    _store_four(sums, stride, error, product, student_norm, norm)


@triton.jit
def _join(pieces_W22D, opener, first, last, width, channel, ROWS: tl.constexpr):
    """The sum of a span's pieces, which programs first to last left.

    The opener's lies where spans that start do.
    """
    sum_WD = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    for base in tl.range(first, last + 1, ROWS, num_stages=3):
        program = base + tl.arange(0, ROWS)
        row = (2 * program + (program == opener).to(tl.int32)) * 2
        mask = (program <= last)[:, None] & (channel < width)[None, :]
        piece_WD = pieces_W22D + row[:, None] * width + channel[None, :]
        sum_WD += tl.load(piece_WD, mask=mask, other=0.0)
    return tl.sum(sum_WD, axis=0)


@triton.jit(do_not_specialize=["num_programs", "num_blocks"])
def total_kernel(
    norm_weight_D, weight_P, cut_W, columns_WD, sums_5W, cut_sums_4WJ,
    moments, pooled_error, token_error, num_programs, num_blocks, width,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up all programs' sums in fp64.

    Program 0 the scalars, the others a block of the teacher's columns each.
    """
    if tl.program_id(0) == 0:
        _total_scalars(
            weight_P, cut_W, sums_5W, cut_sums_4WJ, moments, pooled_error, token_error,
            num_programs, num_blocks, BLOCK_W, ROWS, BLOCK_J,
        )  # fmt: skip
    else:
        channel = (tl.program_id(0) - 1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = channel < width
        sum_WD = tl.zeros((64, BLOCK_D), tl.float64)
        for base in tl.range(0, num_programs, 64, num_stages=3):
            program = base + tl.arange(0, 64)
            mask = (program < num_programs)[:, None] & inside[None, :]
            part_WD = columns_WD + program[:, None] * width + channel[None, :]
            sum_WD += tl.load(part_WD, mask=mask, other=0.0).to(tl.float64)
        scale_D = tl.load(norm_weight_D + channel, mask=inside, other=0.0)
        scale_D = scale_D.to(tl.float32).to(tl.float64)
        tl.store(moments + 4 + channel, tl.sum(sum_WD, axis=0) * scale_D, mask=inside)


@triton.jit
def _total_scalars(
    weight_P, cut_W, sums_5W, cut_sums_4WJ, moments, pooled_error, token_error,
    num_programs, num_blocks,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    weights = _sum_programs(sums_5W, num_programs, BLOCK_W)
    errors = _sum_programs(sums_5W + num_programs, num_programs, BLOCK_W)
    cosines = _sum_programs(sums_5W + 2 * num_programs, num_programs, BLOCK_W)
    norms = _sum_programs(sums_5W + 3 * num_programs, num_programs, BLOCK_W)
    stride = num_programs * num_blocks
    for base in range(0, num_programs, ROWS):
        program = base + tl.arange(0, ROWS)
        span = tl.load(cut_W + program, mask=program < num_programs, other=-1)
        weight = tl.load(weight_P + span, mask=span >= 0, other=0.0).to(tl.float64)
        sums = cut_sums_4WJ + program * num_blocks
        error = _sum_blocks(sums, span >= 0, num_blocks, BLOCK_J)
        product = _sum_blocks(sums + stride, span >= 0, num_blocks, BLOCK_J)
        student_norm = _sum_blocks(sums + 2 * stride, span >= 0, num_blocks, BLOCK_J)
        norm = _sum_blocks(sums + 3 * stride, span >= 0, num_blocks, BLOCK_J)
        weights += tl.sum(weight)
        errors += tl.sum(weight * error)
        cosines += tl.sum(weight * _cosine(product, student_norm, norm))
        norms += tl.sum(weight * norm)
    _store_four(moments, 1, weights, errors, cosines, norms)
    tl.store(pooled_error, errors.to(tl.float32))
    token_errors = _sum_programs(sums_5W + 4 * num_programs, num_programs, BLOCK_W)
    tl.store(token_error, token_errors.to(tl.float32))


@triton.jit
def _sum_programs(sums_W, num_programs, BLOCK_W: tl.constexpr):
    program = tl.arange(0, BLOCK_W)
    return tl.sum(tl.load(sums_W + program, mask=program < num_programs, other=0.0))


@triton.jit
def _sum_blocks(sums_W, valid_W, num_blocks, BLOCK_J: tl.constexpr):
    block = tl.arange(0, BLOCK_J)
    mask = valid_W[:, None] & (block < num_blocks)[None, :]
    sums_WJ = tl.load(sums_W[:, None] + block[None, :], mask=mask, other=0.0)
    return tl.sum(sums_WJ.to(tl.float64), axis=1)
