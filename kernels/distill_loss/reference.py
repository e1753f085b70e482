from typing import NamedTuple

import torch
from torch.nn import functional

from mtllm_engine.spans import Spans


class Distilled(NamedTuple):
    pooled_error: torch.Tensor  # fp32 scalar
    token_error: torch.Tensor  # fp32 scalar
    moments: torch.Tensor  # fp64 (4 + D,), without gradient


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
    student_SD, teacher_TD = (normalise(x, norm_weight_D, eps) for x in (student_SD, teacher_TD))
    student_PD, teacher_PD = pool(student_SD, student_spans), pool(teacher_TD, teacher_spans)
    pooled_error = weight_P @ (student_PD - teacher_PD).square().sum(1)
    token_error = student_SD.new_zeros(())
    if aligned_S is not None:
        # -1, no partner, reads a row that the mask drops
        error_SD = student_SD - teacher_TD[aligned_S.long()]
        token_error = error_SD.square().sum(1) @ (aligned_S >= 0).float()
    return Distilled(pooled_error, token_error, moments(student_PD.detach(), teacher_PD, weight_P))


def normalise(x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x_SD.float(), x_SD.shape[1:], weight_D.float(), eps)


def pool(states_SD: torch.Tensor, spans: Spans) -> torch.Tensor:
    """The mean over each span of tokens, fp32 (P, D)."""
    starts_P, ends_P = spans.bounds_P2.long().unbind(1)
    lengths_P = ends_P - starts_P
    span_S = torch.repeat_interleave(lengths_P)  # of each pooled token
    shift_S = (ends_P - lengths_P.cumsum(0))[span_S]
    token_S = torch.arange(len(span_S), device=span_S.device) + shift_S
    sums_PD = torch.zeros(len(lengths_P), states_SD.shape[1], device=states_SD.device)
    return sums_PD.index_add(0, span_S, states_SD[token_S]) / lengths_P[:, None]


def moments(
    student_PD: torch.Tensor, teacher_PD: torch.Tensor, weight_P: torch.Tensor
) -> torch.Tensor:
    student_PD, teacher_PD, weight_P = student_PD.double(), teacher_PD.double(), weight_P.double()
    error_P, norm_P = (student_PD - teacher_PD).square().sum(1), teacher_PD.square().sum(1)
    cosine_P = torch.cosine_similarity(student_PD, teacher_PD, dim=1)
    sums_4 = weight_P @ torch.stack([torch.ones_like(weight_P), error_P, cosine_P, norm_P], dim=1)
    return torch.cat([sums_4, weight_P @ teacher_PD])
