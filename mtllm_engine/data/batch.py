"""Packs, and the micro-batches made of them.

Shape suffixes, for the whole project:
N documents of a pack, S student (encoder) tokens, T teacher tokens, P pooled spans, A accepted answers, D LLM width,
E encoder width, F feed-forward width, H query heads, G kv heads, K head width, R LoRA rank, V vocabulary, B/L batch and
padded length (only at Hugging Face's edges). Scalars wear nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mtllm_engine.kernels.distill_loss import Spans, build_spans

GOLDEN = np.uint32(0x9E3779B9)
NO_SPANS = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, tokenised for both sides. `seed` (32 bits) names it to the dropout, wherever it is computed.

    Spans and answers are tokens [start, end); number p of one side is the text of number p of the other. All that is
    pooled of a text without spans is the one span that it gets here: the whole, special tokens included.
    """

    key: str
    seed: int
    student_ids_S: np.ndarray  # int32
    teacher_ids_T: np.ndarray  # int32
    row: tuple[int, int, int] = (0, 0, 0)  # where it lies: corpus, shard, number in the shard
    label: int = -1  # index of the class or of the right span; -1: not given
    student_spans_P2: np.ndarray = field(default_factory=lambda: NO_SPANS)  # int32, in order and disjoint, none empty
    teacher_spans_P2: np.ndarray = field(default_factory=lambda: NO_SPANS)
    student_answers_A2: np.ndarray = field(default_factory=lambda: NO_SPANS)  # int32, without what was cut away
    teacher_answers_A2: np.ndarray = field(default_factory=lambda: NO_SPANS)
    student_offsets_S2: np.ndarray | None = None  # int32: each token's characters in the text, where it has answers
    teacher_offsets_T2: np.ndarray | None = None
    aligned_S: np.ndarray | None = None  # int32: each student token's partner among the teacher's tokens, or -1
    targets_PD: np.ndarray | None = None  # fp32: stored states of the teacher, which then does not run

    def __post_init__(self) -> None:
        if not len(self.student_spans_P2):
            object.__setattr__(self, "student_spans_P2", np.array([[0, len(self.student_ids_S)]], np.int32))
            object.__setattr__(self, "teacher_spans_P2", np.array([[0, len(self.teacher_ids_T)]], np.int32))
        assert self.student_spans_P2.shape == self.teacher_spans_P2.shape
        assert self.student_answers_A2.shape == self.teacher_answers_A2.shape

    @property
    def num_tokens(self) -> int:
        """Of the longer side: what counts against a budget that holds on both."""
        return max(len(self.student_ids_S), len(self.teacher_ids_T))


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What one lane gives to one step, and the lane's state once it is consumed."""

    documents: tuple[Document, ...]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One packed stream of N documents without padding, on the device (S stands for S or T)."""

    ids_S: torch.Tensor  # int64
    positions_S: torch.Tensor  # int64, from 0 in each document
    seeds_S: torch.Tensor  # int32: dropout's own number for each token and step
    cu_seqlens: torch.Tensor  # int32 (N+1,)
    lengths: tuple[int, ...]  # of the documents, on the host: nothing downstream needs to ask the device

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: teacher and student see the same documents; span p of one is the text of span p of the other."""

    student: Tokens
    teacher: Tokens
    student_spans: Spans
    teacher_spans: Spans
    weight_P: torch.Tensor  # fp32: 1, or 0 in the idle micro-batch
    weight_N: torch.Tensor  # fp32: likewise
    labels_N: torch.Tensor  # int64: -1 where not given
    student_answers_N2: torch.Tensor  # int64: first and last token of each document's first answer; -1: none
    teacher_answers_N2: torch.Tensor
    document_P: torch.Tensor  # int64: of each span
    place_P: torch.Tensor  # int64: of each span in its document, from 0
    aligned_S: torch.Tensor | None  # int32: each student token's partner among the teacher's tokens, or -1
    targets_PD: torch.Tensor | None  # fp32: stored states of the teacher
    keys: tuple[str, ...]


class Totals(NamedTuple):
    """What the micro-batches of all ranks hold in a step: each term of a loss is a mean over one of these."""

    documents: int
    spans: int  # pooled ones; in stage 1 a document is one
    aligned: int = 0  # student tokens with a partner


def join(packs: Sequence[Pack], max_tokens: int) -> list[list[Document]]:
    """Joins consecutive packs into micro-batches of at most `max_tokens` on each side."""
    groups: list[list[Document]] = []
    room = (0, 0)
    for pack in packs:
        size = _sizes(pack.documents)
        if not pack.documents:
            continue
        if groups and size[0] <= room[0] and size[1] <= room[1]:
            groups[-1].extend(pack.documents)
        else:
            groups.append(list(pack.documents))
            room = (max_tokens, max_tokens)
        room = (room[0] - size[0], room[1] - size[1])
    return groups


def _sizes(documents: Sequence[Document]) -> tuple[int, int]:
    return (
        sum(len(document.student_ids_S) for document in documents),
        sum(len(document.teacher_ids_T) for document in documents),
    )


IDLE = Document(key="", seed=0, student_ids_S=np.zeros(1, np.int32), teacher_ids_T=np.zeros(1, np.int32))


def collate(documents: Sequence[Document], *, step_seed: int, device: torch.device, idle: Document = IDLE) -> Batch:
    """Packs documents into a micro-batch; without any, the idle one: a token of weight 0 on each side.

    A rank with fewer micro-batches than the others runs the idle one, so that all make the same ZeRO-3 collectives.
    """

    def put(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    weight = np.float32(bool(documents))
    keys = tuple(document.key for document in documents)
    documents = documents or [idle]
    student = _pack_tokens([document.student_ids_S for document in documents], documents, step_seed, put)
    teacher = _pack_tokens([document.teacher_ids_T for document in documents], documents, step_seed, put)
    counts = [len(document.student_spans_P2) for document in documents]
    return Batch(
        student=student,
        teacher=teacher,
        student_spans=_pack_spans([document.student_spans_P2 for document in documents], student),
        teacher_spans=_pack_spans([document.teacher_spans_P2 for document in documents], teacher),
        weight_P=put(np.full(sum(counts), weight)),
        weight_N=put(np.full(len(documents), weight)),
        labels_N=put(np.array([document.label for document in documents])),
        student_answers_N2=put(_first_answers([document.student_answers_A2 for document in documents], student)),
        teacher_answers_N2=put(_first_answers([document.teacher_answers_A2 for document in documents], teacher)),
        document_P=put(np.repeat(np.arange(len(documents)), counts)),
        place_P=put(np.concatenate([np.arange(count) for count in counts])),
        aligned_S=None if documents[0].aligned_S is None else put(_pack_aligned(documents, teacher)),
        targets_PD=_pack_targets(documents, put),
        keys=keys,
    )


def _pack_tokens(ids: Sequence[np.ndarray], documents: Sequence[Document], step_seed: int, put: Callable) -> Tokens:
    lengths = [len(document_ids) for document_ids in ids]
    positions_S = np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths])
    seeds_N = np.array([document.seed for document in documents], np.uint32) ^ np.uint32(step_seed)
    seeds_S = mix32(mix32(np.repeat(seeds_N, lengths)) + positions_S * GOLDEN)
    return Tokens(
        ids_S=put(np.concatenate(ids).astype(np.int64)),
        positions_S=put(positions_S.astype(np.int64)),
        seeds_S=put(seeds_S.view(np.int32)),
        cu_seqlens=put(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=tuple(lengths),
    )


def _pack_spans(spans: Sequence[np.ndarray], tokens: Tokens) -> Spans:
    ends_N = np.cumsum(tokens.lengths)
    bounds = [spans_P2 + start for spans_P2, start in zip(spans, ends_N - tokens.lengths)]
    return build_spans(np.concatenate(bounds), ends_N[-1], tokens.ids_S.device)


def _first_answers(answers: Sequence[np.ndarray], tokens: Tokens) -> np.ndarray:
    starts_N = np.cumsum([0, *tokens.lengths[:-1]])
    found = [
        answers_A2[0] + (start, start - 1) if len(answers_A2) else (-1, -1)
        for answers_A2, start in zip(answers, starts_N)
    ]
    return np.array(found, np.int64)


def _pack_aligned(documents: Sequence[Document], teacher: Tokens) -> np.ndarray:
    """Partners by their place in the pack."""
    starts_N = np.cumsum([0, *teacher.lengths[:-1]])
    pieces = [document.aligned_S for document in documents]
    return np.concatenate([np.where(piece < 0, -1, piece + start) for piece, start in zip(pieces, starts_N)]).astype(
        np.int32
    )


def _pack_targets(documents: Sequence[Document], put: Callable) -> torch.Tensor | None:
    targets = [document.targets_PD for document in documents]
    return None if targets[0] is None else put(np.concatenate(targets).astype(np.float32))


def mix32(x: np.ndarray) -> np.ndarray:
    """A bijective 32-bit hash with full avalanche, elementwise on uint32 (murmur3's finaliser)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
