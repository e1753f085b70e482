"""Packs, and the micro-batches made of them.

Shape suffixes, one meaning each in the whole project; scalars wear nothing, and a kernel's own
letters stand in its `__init__`:

    N documents (of a pack, a test set, the probe)    S student (encoder) tokens, or of either side
    T teacher tokens    P pooled spans    C chunks of tokens (spans.py)    A accepted answers
    J lengths of an answer    Y what a head tells: classes, choices    M moments (sums over a batch)
    D LLM width    E encoder width    F feed-forward, or any linear's output width    V vocabulary
    H query heads    G kv heads    K head width, k half of it    R LoRA rank    X resamples
    B batch, L padded length: at Hugging Face's edges, and where Babel's small models train
    I the places of several padded groups, B L of each    W words of Babel's pivot
    digits: themselves (2: [start, end), or a pair)

Of texts in parts (`data.parts`) a student token is one of the LLM's stream: Q parts with U encoder
tokens, special ones included, and the LLM's own Z tokens between them, S = U + Z. Of texts that are
read whole Q = N, U = S and Z = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mtllm_engine.spans import Spans, build_spans

GOLDEN = np.uint32(0x9E3779B9)
NO_SPANS = np.zeros((0, 2), np.int32)


def _no_spans() -> np.ndarray:
    return NO_SPANS


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, tokenised for both sides; `seed` (32 bits) names it to the dropout.

    Spans and answers are tokens [start, end); number p of one side is the text of number p of the
    other. All that is pooled of a text without spans is the one span that it gets here: the whole,
    special tokens included.
    """

    key: str
    seed: int
    student_ids_S: np.ndarray  # int32: the encoder's, and outside of parts the LLM's
    teacher_ids_T: np.ndarray  # int32
    row: tuple[int, int, int] = (0, 0, 0)  # where it lies: corpus, shard, number in the shard
    label: int = -1  # index of the class or of the right span; -1: not given
    student_spans_P2: np.ndarray = field(default_factory=_no_spans)
    """int32, in order and disjoint, none empty; the teacher's likewise."""
    teacher_spans_P2: np.ndarray = field(default_factory=_no_spans)
    student_answers_A2: np.ndarray = field(default_factory=_no_spans)
    """int32, without what was cut away; the teacher's likewise."""
    teacher_answers_A2: np.ndarray = field(default_factory=_no_spans)
    student_offsets_S2: np.ndarray | None = None
    """int32: each token's characters in the text, where it has answers; the teacher's likewise."""
    teacher_offsets_T2: np.ndarray | None = None
    aligned_S: np.ndarray | None = None
    """int32: each student token's partner among the teacher's tokens, or -1."""
    targets_PD: np.ndarray | None = None
    """fp32: stored states of the teacher, which then does not run."""
    parts_Q2: np.ndarray | None = None
    """int32: the student tokens [start, end) that the encoder reads one by one, in order and
    disjoint, at least one; None: it reads all together."""

    def __post_init__(self) -> None:
        if not len(self.student_spans_P2):
            for side, ids in (("student", self.student_ids_S), ("teacher", self.teacher_ids_T)):
                whole_P2 = np.array([[0, len(ids)]], np.int32)
                object.__setattr__(self, f"{side}_spans_P2", whole_P2)
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
    lengths: tuple[int, ...]  # of the documents, on the host, so that nobody asks the device

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the encoder reads of texts in parts, and how its states become the student's stream."""

    tokens: Tokens  # U instead of S, and each part a document
    places_U: torch.Tensor  # int64: of the encoder's states in the student's stream
    between_Z: torch.Tensor  # int64: the LLM's tokens between parts; there may be none
    places_Z: torch.Tensor  # int64: theirs


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: teacher and student see the same documents, and the same text in span p."""

    student: Tokens
    teacher: Tokens
    student_spans: Spans
    teacher_spans: Spans
    weight_P: torch.Tensor  # fp32: 1, or 0 in the idle micro-batch
    weight_N: torch.Tensor  # fp32: likewise
    labels_N: torch.Tensor  # int64: -1 where not given
    student_answers_N2: torch.Tensor
    """int64: first and last token of each document's first answer, or -1; so the teacher's."""
    teacher_answers_N2: torch.Tensor
    document_P: torch.Tensor  # int64: of each span
    index_P: torch.Tensor  # int64: of each span in its document
    aligned_S: torch.Tensor | None
    """int32: each student token's partner among the teacher's tokens, or -1."""
    targets_PD: torch.Tensor | None  # fp32: stored states of the teacher
    parts: Parts | None  # None: the encoder reads the student's tokens as they are
    keys: tuple[str, ...]

    @property
    def encoder(self) -> Tokens:
        """What the encoder reads."""
        return self.parts.tokens if self.parts else self.student


class Totals(NamedTuple):
    """What all ranks' micro-batches of a step hold: each loss term is a mean over one of these."""

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


ONE_PART = np.array([[0, 1]], np.int32)  # of the idle document, where texts have parts
IDLE = Document(
    key="", seed=0, student_ids_S=np.zeros(1, np.int32), teacher_ids_T=np.zeros(1, np.int32)
)


def collate(
    documents: Sequence[Document], *, step_seed: int, device: torch.device, idle: Document = IDLE
) -> Batch:
    """Packs documents into a micro-batch; without any, the idle one: a token of weight 0 a side.

    A rank with fewer micro-batches than the others runs the idle one, so that all make the same
    ZeRO-3 collectives.
    """

    def put(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    weight = np.float32(bool(documents))
    keys = tuple(document.key for document in documents)
    documents = documents or [idle]

    def each(name: str) -> list:
        return [getattr(document, name) for document in documents]

    seeds_N = np.array(each("seed"), np.uint32) ^ np.uint32(step_seed)
    student = _pack_tokens(each("student_ids_S"), seeds_N, put)
    teacher = _pack_tokens(each("teacher_ids_T"), seeds_N, put)
    counts = [len(spans_P2) for spans_P2 in each("student_spans_P2")]
    return Batch(
        student=student,
        teacher=teacher,
        student_spans=_pack_spans(each("student_spans_P2"), student),
        teacher_spans=_pack_spans(each("teacher_spans_P2"), teacher),
        weight_P=put(np.full(sum(counts), weight)),
        weight_N=put(np.full(len(documents), weight)),
        labels_N=put(np.array(each("label"))),
        student_answers_N2=put(_first_answers(each("student_answers_A2"), student)),
        teacher_answers_N2=put(_first_answers(each("teacher_answers_A2"), teacher)),
        document_P=put(np.repeat(np.arange(len(documents)), counts)),
        index_P=put(np.concatenate([np.arange(count) for count in counts])),
        aligned_S=_pack_aligned(each("aligned_S"), teacher, put),
        targets_PD=_pack_targets(each("targets_PD"), put),
        parts=_pack_parts(each("student_ids_S"), each("parts_Q2"), put),
        keys=keys,
    )


def _pack_tokens(ids: Sequence[np.ndarray], seeds_N: np.ndarray, put: Callable) -> Tokens:
    lengths = [len(document_ids) for document_ids in ids]
    positions_S = np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths])
    seeds_S = mix32(mix32(np.repeat(seeds_N, lengths)) + positions_S * GOLDEN)
    return Tokens(
        ids_S=put(np.concatenate(ids).astype(np.int64)),
        positions_S=put(positions_S.astype(np.int64)),
        seeds_S=put(seeds_S.view(np.int32)),
        cu_seqlens=put(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=tuple(lengths),
    )


def _pack_parts(
    ids: Sequence[np.ndarray], parts: Sequence[np.ndarray | None], put: Callable
) -> Parts | None:
    """Args: ids, parts: Of each document; no parts: the documents are read whole."""
    if not (pieces := _present(parts)):
        return None
    starts_N = np.cumsum([0, *map(len, ids[:-1])])
    bounds_Q2 = np.concatenate([each_Q2 + start for each_Q2, start in zip(pieces, starts_N)])
    # Equally long parts one after the other: attention on the CPU runs them at once.
    starts_Q, ends_Q = bounds_Q2[np.argsort(np.diff(bounds_Q2)[:, 0], kind="stable")].T
    ids_S = np.concatenate(ids)
    bounds = list(zip(starts_Q, ends_Q))
    places_U = np.concatenate([np.arange(*part) for part in bounds])
    is_between_S = np.ones(len(ids_S), bool)
    is_between_S[places_U] = False
    no_seeds_Q = np.zeros(len(bounds), np.uint32)  # nothing is dropped in the encoder
    return Parts(
        tokens=_pack_tokens([ids_S[slice(*part)] for part in bounds], no_seeds_Q, put),
        places_U=put(places_U),
        between_Z=put(ids_S[is_between_S].astype(np.int64)),
        places_Z=put(np.flatnonzero(is_between_S)),
    )


def _pack_spans(spans: Sequence[np.ndarray], tokens: Tokens) -> Spans:
    ends_N = np.cumsum(tokens.lengths)
    bounds = [spans_P2 + start for spans_P2, start in zip(spans, ends_N - tokens.lengths)]
    return build_spans(np.concatenate(bounds), ends_N[-1], tokens.ids_S.device)


def _first_answers(answers: Sequence[np.ndarray], tokens: Tokens) -> np.ndarray:
    starts_N = np.cumsum([0, *tokens.lengths[:-1]])
    firsts_N2 = [
        answers_A2[0] + (start, start - 1) if len(answers_A2) else (-1, -1)
        for answers_A2, start in zip(answers, starts_N)
    ]
    return np.array(firsts_N2, np.int64)


def _pack_aligned(
    aligned: Sequence[np.ndarray | None], teacher: Tokens, put: Callable
) -> torch.Tensor | None:
    """Partners by their index in the pack."""
    if not (pieces := _present(aligned)):
        return None
    starts_N = np.cumsum([0, *teacher.lengths[:-1]])
    moved = [np.where(piece_S < 0, -1, piece_S + start) for piece_S, start in zip(pieces, starts_N)]
    return put(np.concatenate(moved).astype(np.int32))


def _pack_targets(targets: Sequence[np.ndarray | None], put: Callable) -> torch.Tensor | None:
    pieces = _present(targets)
    return put(np.concatenate(pieces).astype(np.float32)) if pieces else None


def _present(arrays: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """The arrays, if there are any: all documents of a stream have them, or none has."""
    present = [array for array in arrays if array is not None]
    assert len(present) in (0, len(arrays))
    return present


def mix32(x: np.ndarray) -> np.ndarray:
    """A bijective 32-bit hash with full avalanche, elementwise on uint32 (murmur3's finaliser)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
