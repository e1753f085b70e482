"""The distillation objective, and what says how well it goes: FVU and cosine."""

from typing import NamedTuple

import torch
from torch import nn

from mtllm_engine.data.batch import Batch
from mtllm_engine.kernels.distill_loss import distill_loss


class Distilled(NamedTuple):
    """One micro-batch's share of the loss over the global batch, and the pooled states behind it."""

    loss: torch.Tensor  # fp32 scalar
    student_PD: torch.Tensor  # fp32, detached
    teacher_PD: torch.Tensor


class Objective(nn.Module):
    """sum_p ||s_p - t_p||^2 / (D * P_global) of mean-pooled, finally normed states (arXiv 2406.12739, section 3)."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.Parameter(torch.empty(width, dtype=dtype))  # the LLM's final RMSNorm

    def forward(self, student_SD: torch.Tensor, teacher_TD: torch.Tensor, batch: Batch, global_spans: int) -> Distilled:
        error, student_PD, teacher_PD = distill_loss(
            student_SD, teacher_TD, self.norm, self.eps, batch.student_spans_P2, batch.teacher_spans_P2, batch.weight_P
        )
        loss = error / (student_PD.shape[1] * global_spans)
        return Distilled(loss=loss, student_PD=student_PD.detach(), teacher_PD=teacher_PD.detach())


def moments(distilled: Distilled, weight_P: torch.Tensor) -> torch.Tensor:
    """What FVU and cosine are made of, as sums over spans, fp64 (4 + D,): add them up over anything, in any order.

    Layout: spans, squared error, cosine, squared teacher norm, then the teacher's sum (D).
    """
    student_PD, teacher_PD, weight_P = distilled.student_PD.double(), distilled.teacher_PD.double(), weight_P.double()
    per_span_P4 = torch.stack(
        [
            torch.ones_like(weight_P),
            (student_PD - teacher_PD).square().sum(1),
            torch.cosine_similarity(student_PD, teacher_PD, dim=1),
            teacher_PD.square().sum(1),
        ],
        dim=1,
    )
    return torch.cat([weight_P @ per_span_P4, weight_P @ teacher_PD])


def fvu(moments: torch.Tensor) -> float:
    """Fraction of the teacher's variance that is unexplained: 1.0 is as good as always answering the teacher's mean."""
    spans, error, _, norm = moments[:4].tolist()
    variance = norm - moments[4:].square().sum().item() / max(spans, 1)
    return error / variance if variance > 0 else float("nan")


def cosine(moments: torch.Tensor) -> float:
    """Mean cosine between student and teacher."""
    return moments[2].item() / max(moments[0].item(), 1)
