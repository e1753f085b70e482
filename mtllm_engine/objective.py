"""The distillation objective, and what says how well it goes: FVU and cosine.

`moments`, fp64 (4 + D,), are sums over spans from which both follow: add them up over anything, in any order. Layout:
spans, squared error, cosine, squared teacher norm, then the teacher's sum (D).
"""

from typing import NamedTuple

import torch
from torch import nn

from mtllm_engine.data.batch import Batch
from mtllm_engine.kernels.distill_loss import distill_loss


class Share(NamedTuple):
    """What one micro-batch adds to the global batch."""

    loss: torch.Tensor  # fp32 scalar
    moments: torch.Tensor  # fp64 (4 + D,), without gradient


class Objective(nn.Module):
    """sum_p ||s_p - t_p||^2 / (D * P_global) of mean-pooled, finally normed states (arXiv 2406.12739, section 3)."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.Parameter(torch.empty(width, dtype=dtype))  # the LLM's final RMSNorm

    def forward(self, student_SD: torch.Tensor, teacher_TD: torch.Tensor, batch: Batch, global_spans: int) -> Share:
        distilled = distill_loss(
            student_SD, teacher_TD, self.norm, self.eps, batch.student_spans, batch.teacher_spans, batch.weight_P
        )
        return Share(distilled.pooled_error / (student_SD.shape[1] * global_spans), distilled.moments)


def fvu(moments: torch.Tensor) -> float:
    """Fraction of the teacher's variance that is unexplained: 1.0 is as good as always answering the teacher's mean."""
    spans, error, _, norm = moments[:4].tolist()
    variance = norm - moments[4:].square().sum().item() / max(spans, 1)
    return error / variance if variance > 0 else float("nan")


def cosine(moments: torch.Tensor) -> float:
    """Mean cosine between student and teacher."""
    return moments[2].item() / max(moments[0].item(), 1)
