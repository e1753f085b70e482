"""What training minimises, and what says how well it goes: distillation, and the English task
behind it.

Each objective is the last leaf of the stack: it norms, pools and measures. Its `moments` (fp64) are
sums from which all figures follow: add them up over anything, in any order, and `measures` turns
them into names and numbers.
"""

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mtllm_engine.data.batch import Batch, Totals
from mtllm_engine.kernels.distill_loss import distill_loss
from mtllm_engine.kernels.distill_loss.reference import moments as distillation_moments
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.spans import Spans

LONGEST_ANSWER = 30  # tokens

HeadSize = tuple[Literal["classification", "choice", "span"], int]
"""Kind of a head and number of its outputs: classes, choices, or 2 (an answer's start and end)."""


class Outputs(NamedTuple):
    """What evaluation reads, fp32; None where the objective has no such thing."""

    student_PD: torch.Tensor
    teacher_PD: torch.Tensor | None
    scores_NY: torch.Tensor | None  # the head's, one row per document
    answers_N2: torch.Tensor | None = (
        None  # int64: each document's tokens [start, end) that a span head answers with
    )


class Share(NamedTuple):
    """What one micro-batch adds to the global batch."""

    loss: torch.Tensor  # fp32 scalar
    moments: torch.Tensor  # fp64, without gradient
    outputs: Outputs | None = None  # in evaluation only


class Head(nn.Module):
    """A bias-free linear on pooled states: a score per class, or (`per_choice`) per span of a
    document."""

    def __init__(self, width: int, num_outputs: int, *, per_choice: bool) -> None:
        super().__init__()
        self.num_outputs, self.per_choice = num_outputs, per_choice
        self.weight = nn.Parameter(torch.empty(1 if per_choice else num_outputs, width))

    def forward(self, pooled_PD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """fp32 (N, C): the scores of each document; -inf for a choice that it does not have."""
        scores_PY = functional.linear(pooled_PD, self.weight)
        if not self.per_choice:
            return scores_PY
        scores_NY = scores_PY.new_full((len(batch.weight_N), self.num_outputs), float("-inf"))
        return scores_NY.index_put((batch.document_P, batch.index_P), scores_PY[:, 0])


class SpanHead(nn.Module):
    """A bias-free linear on every token of a document's one span: does an answer start, or end,
    here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))

    def forward(self, normed_SD: torch.Tensor) -> torch.Tensor:
        """fp32 (2, S): scores of being an answer's first token, and its last."""
        return functional.linear(normed_SD.float(), self.weight).T


def build_head(width: int, size: HeadSize | None) -> Head | SpanHead | None:
    if size is None:
        return None
    kind, outputs = size
    return SpanHead(width) if kind == "span" else Head(width, outputs, per_choice=kind == "choice")


def best_answers(scores_2S: torch.Tensor, spans: Spans) -> torch.Tensor:
    """int64 (P, 2): each span's first and last token with the highest sum of scores.

    An answer has `LONGEST_ANSWER` tokens at most. Of equal sums the first token decides, then the
    shorter answer.
    """
    starts_S, ends_S = scores_2S
    is_inside_PS = is_inside(spans)
    # All answers at once, by first token S and number of tokens after it J: an answer must end
    # where its first token's span does, which for a token of no span is at 0.
    sizes = (len(ends_S), LONGEST_ANSWER)
    token_S, length_J = (torch.arange(size, device=ends_S.device) for size in sizes)
    end_of_span_S = (is_inside_PS * spans.bounds_P2[:, 1:]).sum(0)
    is_in_span_SJ = token_S[:, None] + length_J < end_of_span_S[:, None]
    # Each first token's best answer, of which `max` takes the shortest.
    last_SJ = functional.pad(ends_S, (0, LONGEST_ANSWER - 1)).unfold(0, LONGEST_ANSWER, 1)
    scores_SJ = (starts_S[:, None] + last_SJ).masked_fill(~is_in_span_SJ, float("-inf"))
    best_S, length_S = scores_SJ.max(1)
    # Each span's best first token, of which `argmax` takes the first.
    first_P = best_S.where(is_inside_PS, float("-inf")).argmax(1)
    return torch.stack([first_P, first_P + length_S[first_P]], dim=1)


class Objective(nn.Module):
    """The LLM's final norm, and a head where there is a task."""

    def __init__(self, norm: nn.Parameter, eps: float, head: Head | SpanHead | None) -> None:
        super().__init__()
        self.norm, self.eps, self.head = norm, eps, head

    def pool(self, hidden_SD: torch.Tensor, spans: Spans) -> torch.Tensor:
        """The mean of the finally normed states over each span, fp32 (P, D)."""
        normed_SD, _ = rms_norm(hidden_SD, self.norm, self.eps)
        mean_PS = is_inside(spans) / spans.bounds_P2.diff(dim=1)
        # A product: the same twice, and nothing is asked of the device.
        return mean_PS @ normed_SD.float()

    def _scored(self, scores_NY: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """fp64 (2,): labelled documents, and those whose highest score is their label's."""
        if scores_NY is None:
            return batch.weight_P.new_zeros(2, dtype=torch.float64)
        weight_N = batch.weight_N.double() * (batch.labels_N >= 0)
        return torch.stack(
            [weight_N.sum(), weight_N @ (scores_NY.detach().argmax(1) == batch.labels_N).double()]
        )


class Distillation(Objective):
    """sum_p ||s_p - t_p||^2 / (D * P_global) of mean-pooled, finally normed states (arXiv
    2406.12739, section 3).

    With `token_weight` w: (1 - w) times that, plus w times the same mean over student tokens that
    have a partner (the authors' second recipe). A head is the fine-tuned LLM's, frozen, and only
    measured.
    """

    def __init__(
        self, norm: nn.Parameter, eps: float, head: Head | None, *, token_weight: float
    ) -> None:
        super().__init__(norm, eps, head)
        self.token_weight = token_weight

    def forward(
        self,
        batch: Batch,
        totals: Totals,
        student_SD: torch.Tensor,
        teacher_TD: torch.Tensor | None = None,
    ) -> Share:
        """Args: teacher_TD: None where the batch brings stored targets instead."""
        width = student_SD.shape[1]
        if teacher_TD is None:
            loss, moments = self._against_targets(batch, student_SD)
            loss = loss / (width * totals.spans)
        else:
            spans = (batch.student_spans, batch.teacher_spans, batch.weight_P)
            distilled = distill_loss(
                student_SD, teacher_TD, self.norm, self.eps, *spans, batch.aligned_S
            )
            loss, moments = distilled.pooled_error / (width * totals.spans), distilled.moments
            if batch.aligned_S is not None:
                token_loss = distilled.token_error / (width * max(totals.aligned, 1))
                loss = (1 - self.token_weight) * loss + self.token_weight * token_loss
        outputs = None if self.training else self._outputs(batch, student_SD, teacher_TD)
        scored = self._scored(outputs and outputs.scores_NY, batch)
        return Share(loss, torch.cat([scored, moments]), outputs)

    def measures(self, moments: torch.Tensor) -> dict[str, float]:
        """FVU and cosine; accuracy where documents were scored."""
        return {"fvu": fvu(moments[2:]), "cosine": cosine(moments[2:])} | _accuracy(moments)

    def _against_targets(
        self, batch: Batch, student_SD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student_PD = self.pool(student_SD, batch.student_spans)
        error = batch.weight_P @ (student_PD - batch.targets_PD).square().sum(1)
        return error, distillation_moments(student_PD.detach(), batch.targets_PD, batch.weight_P)

    def _outputs(
        self, batch: Batch, student_SD: torch.Tensor, teacher_TD: torch.Tensor | None
    ) -> Outputs:
        student_PD = self.pool(student_SD, batch.student_spans)
        teacher_PD = (
            batch.targets_PD if teacher_TD is None else self.pool(teacher_TD, batch.teacher_spans)
        )
        return Outputs(student_PD, teacher_PD, self.head and self.head(student_PD, batch))


class Finetuning(Objective):
    """Cross-entropy of the head's scores, a mean over the global batch's documents: what is learned
    from has a label. Without labels, or without a head, what evaluation reads is all there is.
    """

    def __init__(self, norm: nn.Parameter, eps: float, head: Head | None, *, side: str) -> None:
        super().__init__(norm, eps, head)
        self.side = (
            side  # whose tokens are read: "student", the stack's, or "teacher", the LLM's own
        )

    def forward(self, batch: Batch, totals: Totals, hidden_SD: torch.Tensor) -> Share:
        pooled_PD = self.pool(hidden_SD, getattr(batch, f"{self.side}_spans"))
        scores_NY = self.head and self.head(pooled_PD, batch)
        outputs = None if self.training else Outputs(pooled_PD, None, scores_NY)
        loss = batch.weight_N.new_zeros(())
        if scores_NY is not None:
            losses_N = functional.cross_entropy(
                scores_NY, batch.labels_N, ignore_index=-1, reduction="none"
            )
            loss = batch.weight_N @ losses_N / totals.documents
        return Share(loss, self._scored(scores_NY, batch), outputs)

    def measures(self, moments: torch.Tensor) -> dict[str, float]:
        """Accuracy."""
        return _accuracy(moments)


class SpanFinetuning(Objective):
    """Cross-entropy of where the answer starts and ends, over the tokens of its document's one
    span.

    A mean over both and over the global batch's documents. The target is the first accepted answer
    that is read whole: a document of which all were cut away adds nothing to the loss, and counts
    as answered wrongly.
    """

    def __init__(self, norm: nn.Parameter, eps: float, head: SpanHead, *, side: str) -> None:
        super().__init__(norm, eps, head)
        self.side = side  # as in `Finetuning`

    def forward(self, batch: Batch, totals: Totals, hidden_SD: torch.Tensor) -> Share:
        spans, answers_N2 = (
            getattr(batch, f"{self.side}_{name}") for name in ("spans", "answers_N2")
        )
        normed_SD, _ = rms_norm(hidden_SD, self.norm, self.eps)
        scores_2S = self.head(normed_SD)
        scores_2NS = scores_2S[:, None].where(is_inside(spans), float("-inf"))
        options = {"ignore_index": -1, "reduction": "none"}
        losses_2N = [
            functional.cross_entropy(*each, **options) for each in zip(scores_2NS, answers_N2.T)
        ]
        given_N2 = best_answers(scores_2S.detach(), spans)
        weight_N = batch.weight_N.double()
        moments = torch.stack([weight_N.sum(), weight_N @ (given_N2 == answers_N2).all(1).double()])
        outputs = None if self.training else self._outputs(batch, hidden_SD, spans, given_N2)
        return Share(batch.weight_N @ sum(losses_2N) / (2 * totals.documents), moments, outputs)

    def measures(self, moments: torch.Tensor) -> dict[str, float]:
        """Accuracy: the share of documents whose answer is the target, token by token."""
        return _accuracy(moments)

    def _outputs(
        self, batch: Batch, hidden_SD: torch.Tensor, spans: Spans, given_N2: torch.Tensor
    ) -> Outputs:
        first_N1 = getattr(batch, self.side).cu_seqlens[:-1, None]
        answers_N2 = given_N2 - first_N1 + torch.tensor([0, 1], device=given_N2.device)
        return Outputs(self.pool(hidden_SD, spans), None, None, answers_N2)


def build_reading(
    norm: nn.Parameter, eps: float, head: Head | SpanHead | None, *, side: str
) -> "Finetuning | SpanFinetuning":
    """What learns from labels, or only reads."""
    kind = SpanFinetuning if isinstance(head, SpanHead) else Finetuning
    return kind(norm, eps, head, side=side)


def is_inside(spans: Spans) -> torch.Tensor:
    """bool (P, S): whether a token is one of a span's."""
    token_S = torch.arange(spans.num_tokens, device=spans.bounds_P2.device)
    return (token_S >= spans.bounds_P2[:, :1]) & (token_S < spans.bounds_P2[:, 1:])


def fvu(moments: torch.Tensor) -> float:
    """Fraction of the teacher's variance that is unexplained: 1.0 is as good as always answering
    the teacher's mean.

    Args:
        moments: distill_loss's (4 + D,): spans, squared error, cosine, squared teacher norm, the
            teacher's sum.
    """
    spans, error, _, norm = moments[:4].tolist()
    variance = norm - moments[4:].square().sum().item() / max(spans, 1)
    return error / variance if variance > 0 else float("nan")


def cosine(moments: torch.Tensor) -> float:
    """Mean cosine between student and teacher."""
    return moments[2].item() / max(moments[0].item(), 1)


def _accuracy(moments: torch.Tensor) -> dict[str, float]:
    documents, correct = moments[:2].tolist()
    return {"accuracy": correct / documents} if documents else {}
