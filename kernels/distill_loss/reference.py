import torch
from mtllm_engine.kernels.rms_norm.reference import rms_norm


def distill_loss(
    student_SD: torch.Tensor,
    teacher_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    student_spans_P2: torch.Tensor,
    teacher_spans_P2: torch.Tensor,
    weight_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student_PD = pool(rms_norm(student_SD, norm_weight_D, eps), student_spans_P2)
    teacher_PD = pool(rms_norm(teacher_TD, norm_weight_D, eps), teacher_spans_P2)
    error_P = (student_PD - teacher_PD).square().sum(-1)
    return (weight_P * error_P).sum(), student_PD, teacher_PD


def pool(states_SD: torch.Tensor, spans_P2: torch.Tensor) -> torch.Tensor:
    """The mean over each span of tokens, fp32 (P, D)."""
    lengths_P = spans_P2[:, 1] - spans_P2[:, 0]
    ends_P = lengths_P.cumsum(0)
    span_S = torch.repeat_interleave(lengths_P)  # the span of each pooled token
    token_S = torch.arange(len(span_S), device=span_S.device) + (spans_P2[:, 1] - ends_P)[span_S]
    sums_PD = torch.zeros(len(spans_P2), states_SD.shape[1], device=states_SD.device)
    return sums_PD.index_add(0, span_S, states_SD[token_S].float()) / lengths_P[:, None]
