"""What every implementation of distill_loss asks of its arguments."""

import torch
from mtllm_engine.kernels.contract import DTYPES, check

from mtllm_engine.spans import Spans

MAX_WIDTH = 16384  # D up to which a row fits the registers of one program


def check_inputs(
    student_SD: torch.Tensor,
    teacher_TD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    student_spans: Spans,
    teacher_spans: Spans,
    weight_P: torch.Tensor,
    aligned_S: torch.Tensor | None = None,
    *,
    max_width: int = MAX_WIDTH,
) -> None:
    """Checks what can be seen without asking the device, so not that `aligned_S` is below T.

    Raises:
        ValueError: An argument, which the message names, has the wrong shape, dtype or device, or
            is not contiguous.
    """
    _check_states(student_SD, teacher_TD, norm_weight_D, max_width)
    if eps < 0:
        raise ValueError(f"eps is {eps}; a variance needs one that is not negative")
    _check_spans("student", student_spans, student_SD)
    _check_spans("teacher", teacher_spans, teacher_TD)
    if len(teacher_spans) != len(student_spans):
        counts = f"teacher_spans are {len(teacher_spans)}, student_spans {len(student_spans)}"
        raise ValueError(f"{counts}; they are pairs")
    _check_vector("weight_P", weight_P, len(student_spans), torch.float32)
    if aligned_S is not None:
        _check_vector("aligned_S", aligned_S, student_spans.num_tokens, torch.int32)
    check(student_SD, student_SD=student_SD, teacher_TD=teacher_TD, norm_weight_D=norm_weight_D)
    check(student_SD, weight_P=weight_P, aligned_S=aligned_S)
    for name in ("bounds_P2", "chunks_C3"):
        spans = {"student_spans": student_spans, "teacher_spans": teacher_spans}
        check(student_SD, **{side: getattr(each, name) for side, each in spans.items()})


def _check_states(
    student_SD: torch.Tensor, teacher_TD: torch.Tensor, norm_weight_D: torch.Tensor, max_width: int
) -> None:
    dtypes = ", ".join(map(str, DTYPES))
    for name, states in (("student_SD", student_SD), ("teacher_TD", teacher_TD)):
        if states.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(states.shape)}; it takes two dimensions, tokens and width"
            )
        if states.dtype not in DTYPES:
            raise ValueError(f"{name} is {states.dtype}; it takes {dtypes}")
    width = student_SD.shape[1]
    if not 1 <= width <= max_width:
        raise ValueError(f"student_SD is {width} wide; 1 to {max_width} are possible")
    if teacher_TD.shape[1] != width:
        raise ValueError(f"teacher_TD is {teacher_TD.shape[1]} wide, student_SD {width}")
    if teacher_TD.dtype != student_SD.dtype:
        raise ValueError(f"teacher_TD is {teacher_TD.dtype}, student_SD {student_SD.dtype}")
    if norm_weight_D.shape != (width,):
        raise ValueError(
            f"norm_weight_D has shape {tuple(norm_weight_D.shape)}; student_SD needs ({width},)"
        )
    if norm_weight_D.dtype not in DTYPES:
        raise ValueError(f"norm_weight_D is {norm_weight_D.dtype}; it takes {dtypes}")


def _check_spans(side: str, spans: Spans, states: torch.Tensor) -> None:
    if spans.num_tokens != len(states):
        raise ValueError(
            f"{side}_spans are of {spans.num_tokens} tokens, the {side}'s states of {len(states)}"
        )


def _check_vector(name: str, vector: torch.Tensor, length: int, dtype: torch.dtype) -> None:
    if vector.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; it takes ({length},)")
    if vector.dtype != dtype:
        raise ValueError(f"{name} is {vector.dtype}; it takes {dtype}")
