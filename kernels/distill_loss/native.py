"""distill_loss in C++ (csrc/cpu) and in CUDA C++ (csrc/cuda); torch picks the device's op.

Nothing chooses the latter yet, see csrc/cuda/distill_loss.cu.
"""

import sys
from collections.abc import Callable

import torch

from mtllm_engine.kernels import native
from mtllm_engine.spans import Spans

from .checks import check_inputs
from .reference import Distilled

native.load("cpu")

MAX_CUDA_WIDTH = 8192  # D up to which one block holds a row in registers


def __getattr__(name: str) -> Callable[..., Distilled]:
    """`distill_loss_cuda` is `distill_loss` once its ops are built: where not, an ImportError."""
    if name != "distill_loss_cuda":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    native.load("cuda")
    return distill_loss


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
        student_SD: fp32, bf16 or fp16; the only argument that gets a gradient. D <= 8192 on CUDA
            devices.
        teacher_TD: The same dtype.
        norm_weight_D: Any of these dtypes, not rounded; frozen.
        student_spans: P spans, each the partner of the teacher's span of the same number.
        weight_P: fp32.
        aligned_S: int32, each student token's partner among the teacher's tokens, or -1. That it is
            below T is the caller's promise on CUDA devices: to check it would ask them.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or is not contiguous, or out
            of range.

    Source: arXiv 2406.12739, section 3.
    """
    states = (student_SD, teacher_TD, norm_weight_D, eps)
    inputs = (*states, student_spans, teacher_spans, weight_P, aligned_S)
    check_inputs(*inputs, max_width=MAX_CUDA_WIDTH if student_SD.is_cuda else sys.maxsize)
    num_teacher = len(teacher_TD)
    is_seen = aligned_S is not None and aligned_S.device.type == "cpu"
    if is_seen and (aligned_S >= num_teacher).any():
        raise ValueError(
            f"aligned_S has partners from {num_teacher} on, beyond the teacher's tokens"
        )
    if torch.is_grad_enabled() and student_SD.requires_grad:
        return Distilled(*_DistillLoss.apply(*inputs))
    return Distilled(*_measure(*inputs, keep_error=False)[:3])


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_SD, teacher_TD, norm_weight_D, eps, student_spans, teacher_spans, weight_P,
        aligned_S,
    ):  # fmt: skip
        states = (student_SD, teacher_TD, norm_weight_D, eps)
        inputs = (*states, student_spans, teacher_spans, weight_P, aligned_S)
        *distilled, error_PD = _measure(*inputs, keep_error=True)
        partners_TD = None if aligned_S is None else teacher_TD
        ctx.save_for_backward(student_SD, partners_TD, norm_weight_D, weight_P, error_PD, aligned_S)
        ctx.eps, ctx.spans = eps, student_spans
        _, token_error, moments = distilled
        constants = [moments] if aligned_S is not None else [moments, token_error]
        ctx.mark_non_differentiable(*constants)
        return tuple(distilled)

    @staticmethod
    def backward(ctx, pooled_grad, token_grad, _):
        student_SD, partners_TD, norm_weight_D, weight_P, error_PD, aligned_S = ctx.saved_tensors
        spans = (ctx.spans.bounds_P2, ctx.spans.chunks_C3)
        states = (student_SD, partners_TD, norm_weight_D.float(), ctx.eps)
        student_grad_SD = torch.ops.mtllm.distill_loss_backward(
            pooled_grad, token_grad, *states, *spans, weight_P, error_PD, aligned_S
        )
        return student_grad_SD, *[None] * 7


def _measure(
    student_SD: torch.Tensor,
    teacher_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    student_spans: Spans,
    teacher_spans: Spans,
    weight_P: torch.Tensor,
    aligned_S: torch.Tensor | None,
    *,
    keep_error: bool,
) -> tuple[torch.Tensor, ...]:
    """The three results, and the pooled differences, fp32 (P, D) if kept."""
    spans = [x for side in (student_spans, teacher_spans) for x in (side.bounds_P2, side.chunks_C3)]
    states = (student_SD.detach(), teacher_TD.detach(), norm_weight_D.detach().float(), eps)
    return torch.ops.mtllm.distill_loss_forward(
        *states, *spans, weight_P.detach(), aligned_S, keep_error
    )
