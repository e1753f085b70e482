"""distill_loss: how far the student's finally normed states are from the teacher's.

With y = RMSNorm(hidden) for both, s_p and t_p the means of y over span p:
    pooled_error = sum_p weight_p ||s_p - t_p||^2
    token_error  = sum over the student's tokens with a partner of ||y_student - y_teacher||^2
    moments      = sums over spans, each times weight_p:
                   1, ||s_p - t_p||^2, cosine(s_p, t_p), ||t_p||^2, then t_p (D)
`aligned` (int32, S) gives each student token's partner among the teacher's tokens, or -1. The
norm's weight is frozen, the teacher gets no gradient, moments are fp64 and have none.
Source: arXiv 2406.12739, section 3: the loss is pooled_error / (D * spans in the global batch); the
token term is the authors' second recipe.

Letters, beside the project's legend: C chunks of tokens (spans.py), W workers that keep sums of
their own (programs in Triton, groups of spans in C++), J blocks of channels of join_kernel.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from mtllm_engine.spans import Spans, build_spans

from .reference import Distilled
from .reference import distill_loss as reference

__all__ = ["Distilled", "distill_loss"]


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    width: int,
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    gap: int,
    aligned: bool,
    fp32_weight: bool = False,
) -> dict[str, Any]:
    """Arguments of the op.

    Args:
        student: Lengths of the spans; teacher too.
        gap: Tokens between, before and after them that belong to none.
        fp32_weight: The norm's weight is fp32, whatever the states are.
    """
    student_spans, teacher_spans = (
        _spaced(lengths, gap, generator.device) for lengths in (student, teacher)
    )
    options = {"generator": generator, "device": generator.device}
    weight_dtype = torch.float32 if fp32_weight else dtype
    weight_P = torch.rand(len(student), **options) + 0.5
    arguments = {
        "student_SD": randn(generator, dtype, student_spans.num_tokens, width, grad=True),
        "teacher_TD": randn(generator, dtype, teacher_spans.num_tokens, width),
        "norm_weight_D": 1 + 0.1 * randn(generator, weight_dtype, width),
        "eps": 1e-5,
        "student_spans": student_spans,
        "teacher_spans": teacher_spans,
        "weight_P": weight_P,
        "aligned_S": None,
    }
    if aligned:
        size, num_teacher = (student_spans.num_tokens,), teacher_spans.num_tokens
        aligned_S = torch.randint(-1, num_teacher, size, **options, dtype=torch.int32)
        arguments["aligned_S"] = aligned_S
    return arguments


def cost(
    dtype: torch.dtype,
    *,
    width: int,
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    gap: int,
    aligned: bool,
    fp32_weight: bool = False,
) -> tuple[Cost, Cost]:
    num_student, num_teacher = (
        sum(lengths) + gap * (len(lengths) + 1) for lengths in (student, teacher)
    )
    again = num_student if aligned else 0  # the partners' rows, a second time
    # The pooled differences, fp32: forward leaves them, backward reads them
    kept = len(student) * width * 4
    forward = Cost(
        bytes=(num_student + num_teacher + again) * width * dtype.itemsize + kept,
        flops=5 * (num_student + num_teacher) * width,
    )
    backward = Cost(
        bytes=(2 * num_student + again) * width * dtype.itemsize + kept,
        flops=9 * num_student * width,
    )
    return forward, backward


def _spaced(lengths: tuple[int, ...], gap: int, device: torch.device) -> Spans:
    bounds, start = [], gap
    for length in lengths:
        bounds.append((start, start + length))
        start += length + gap
    return build_spans(bounds, start, device)


distill_loss = Kernel(
    name="distill_loss",
    reference=reference,
    implementations={
        "c++": Implementation("cpu", "c++", "distill_loss.native:distill_loss"),
        "triton": Implementation("cuda", "triton", "distill_loss.fused:distill_loss"),
        "cuda c++": Implementation("cuda", "c++", "distill_loss.native:distill_loss_cuda"),
    },
    inputs=inputs,
    cases=(
        {"width": 16, "student": (1,), "teacher": (1,), "gap": 0, "aligned": False},
        {
            "width": 48,
            "student": (3, 1, 70, 9),
            "teacher": (2, 130, 1, 64),
            "gap": 0,
            "aligned": False,
            "fp32_weight": True,
        },
        {"width": 100, "student": (5, 66), "teacher": (7, 3), "gap": 2, "aligned": True},
        {"width": 16, "student": (70, 2), "teacher": (4200, 1), "gap": 0, "aligned": False},
        {"width": 40, "student": (1,) * 200, "teacher": (1,) * 200, "gap": 0, "aligned": False},
    ),
    shapes=(
        {"width": 4096, "student": (256,) * 64, "teacher": (256,) * 64, "gap": 0, "aligned": False},
        {"width": 4096, "student": (256,) * 64, "teacher": (256,) * 64, "gap": 0, "aligned": True},
        {"width": 4096, "student": (4,) * 4096, "teacher": (4,) * 4096, "gap": 0, "aligned": False},
        {"width": 4096, "student": (16384,), "teacher": (16384,), "gap": 0, "aligned": False},
    ),
    cost=cost,
)
