"""Lanes: what step k trains on, whatever the number of ranks.

An epoch's samples are numbered along its seeded shard permutation and, inside each shard, along a
permutation of its own. Lane l owns the numbers [l*n/lanes, (l+1)*n/lanes) and packs its documents
in that order; a step consumes one pack from every lane. A lane's state is the position after its
last consumed pack; nothing else is hidden anywhere.
"""

import contextlib
import functools
import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtllm_engine.config import DataConfig
from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations, partners
from mtllm_engine.data.batch import (
    IDLE,
    ONE_PART,
    Batch,
    Document,
    Pack,
    Totals,
    collate,
    join,
)
from mtllm_engine.data.parts import find_parts
from mtllm_engine.data.shards import BadDocumentError, Corpus
from mtllm_engine.data.tars import DamagedShardError
from mtllm_engine.data.teacher_states import TeacherStates
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.world import World

BARREN_EPOCHS = (
    16  # how often a lane may pass over nothing but damaged shards; each epoch gives it others
)


class Order:
    """The numbering of a corpus' samples in each epoch: `locate(epoch, number) -> (shard,
    index)`.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self._shards = functools.lru_cache(maxsize=4)(self._shard_permutation)
        self._samples = functools.lru_cache(maxsize=256)(self._sample_permutation)

    def locate(self, epoch: int, number: int) -> tuple[int, int]:
        shards, ends = self._shards(epoch)
        rank = int(np.searchsorted(ends, number, side="right"))
        shard = int(shards[rank])
        index = number - int(ends[rank] - self.sizes[shard])
        return shard, int(self._samples(epoch, shard)[index])

    def _shard_permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(len(self.sizes), self.seed, epoch, -1)
        return shards, np.cumsum(self.sizes[shards])

    def _sample_permutation(self, epoch: int, shard: int) -> np.ndarray:
        return permutation(int(self.sizes[shard]), self.seed, epoch, shard).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What all lanes share: the corpora, how they are mixed, and how documents become packs."""

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    tokenizer: PairTokenizer
    config: DataConfig
    lanes: int
    seed: int
    epochs: int | None  # None: endless
    aligns: bool = False  # documents say which of their tokens are partners
    labelled: bool = False  # a document without a label is a bad one
    teacher_states: tuple[TeacherStates, ...] = ()  # by corpus
    orders: tuple[Order, ...] = field(init=False)

    def __post_init__(self) -> None:
        orders = tuple(
            Order([shard.samples for shard in corpus.manifest.shards], self.seed)
            for corpus in self.corpora
        )
        object.__setattr__(self, "orders", orders)

    @property
    def pairs(self) -> float:
        """The share of pairs in what is learned; what is measured is as it is."""
        return self.config.pairs if self.epochs is None else 0.0

    def draw(self, lane: int, count: int) -> int:
        """The corpus of a lane's next document: a hash of its draw counter against the weights."""
        if len(self.corpora) == 1:
            return 0
        ends = np.cumsum(self.weights)
        point = int(hash64(np.array([count]), self.seed, lane, -2)[0]) / 2**64 * ends[-1]
        return int(np.searchsorted(ends, point, side="right"))

    def bounds(self, corpus: int, lane: int) -> tuple[int, int]:
        """The numbers [start, end) of an epoch of a corpus that belong to a lane."""
        samples = self.corpora[corpus].manifest.samples
        return lane * samples // self.lanes, (lane + 1) * samples // self.lanes


class Lane:
    """One lane: its documents, in order, and its packs. State: `draws`, `skipped`, and (epoch,
    position) by corpus.
    """

    def __init__(self, mixture: Mixture, number: int) -> None:
        self.mixture = mixture
        self.number = number
        self.bounds = [mixture.bounds(corpus, number) for corpus in range(len(mixture.corpora))]

    def start(self) -> dict[str, Any]:
        return {"draws": 0, "skipped": 0, "positions": [[0, 0] for _ in self.bounds]}

    def packs(self, state: dict[str, Any]) -> Iterator[Pack]:
        """Packs from `state` on; each carries the state from which the next one starts."""
        config = self.mixture.config
        documents: list[Document] = []
        room = np.zeros(2, dtype=np.int64)
        for document, after in self.documents(state):
            if document is not None:
                size = (len(document.student_ids_S), len(document.teacher_ids_T))
                if documents and config.pack_tokens and (size > room).any():
                    yield Pack(documents=tuple(documents), state=state)
                    documents = []
                room = (room if documents else config.pack_tokens) - np.array(size)
                documents.append(document)
            state = after
            if documents and len(documents) == config.pack_documents:
                yield Pack(documents=tuple(documents), state=state)
                documents = []
        # A finite lane's last: perhaps none, but its skips count.
        yield Pack(documents=tuple(documents), state=state)

    def documents(self, state: dict[str, Any]) -> Iterator[tuple[Document | None, dict[str, Any]]]:
        """The documents from `state` on, None for a skipped one, each with the state after it."""
        barren = 0
        owned = sum(end - start for start, end in self.bounds)
        while (step := self._advance(state)) is not None:
            corpus, epoch, number, state = step
            document = self._read(corpus, epoch, number)
            barren = 0 if document is not None else barren + 1
            if barren > BARREN_EPOCHS * owned and self.mixture.epochs is None:
                raise ValueError(
                    f"lane {self.number} has no usable document: {barren} in a row were skipped"
                )
            state["skipped"] += document is None
            yield document, state

    def _advance(self, state: dict[str, Any]) -> tuple[int, int, int, dict[str, Any]] | None:
        """The next sample's corpus, epoch and number in it, and the state after it; None where a
        finite lane ends.
        """
        corpus = self.mixture.draw(self.number, state["draws"])
        start, end = self.bounds[corpus]
        epoch, position = state["positions"][corpus]
        if position == end - start:
            epoch, position = epoch + 1, 0
        if start == end or epoch == self.mixture.epochs:
            return None
        positions = list(state["positions"])
        positions[corpus] = [epoch, position + 1]
        after = {"draws": state["draws"] + 1, "skipped": state["skipped"], "positions": positions}
        return corpus, epoch, start + position, after

    def _read(self, corpus: int, epoch: int, number: int) -> Document | None:
        shard, index = self.mixture.orders[corpus].locate(epoch, number)
        try:
            return self._tokenised(corpus, shard, index, epoch)
        except (DamagedShardError, BadDocumentError):
            if self.mixture.config.on_error == "raise":
                raise
            return None

    def _tokenised(self, number: int, shard: int, index: int, epoch: int) -> Document:
        """Args: number: of the corpus."""
        corpus, states = self.mixture.corpora[number], self.mixture.teacher_states
        (key, text), annotations = corpus.read_example(shard, index)
        if self.mixture.pairs and annotations == NO_ANNOTATIONS:
            text = self._paired(text, number, shard, index, epoch)
        try:
            if self.mixture.labelled and annotations.label < 0:
                fix = 'leave it out, or set data.on_error="skip"'
                raise ValueError(f"it has no label to learn; {fix}")
            tokens = self._tokens(text, corpus.manifest.language, annotations)
        except ValueError as error:
            path = corpus.path / corpus.manifest.shards[shard].name
            raise BadDocumentError(f"shard {path}, key {key}: {error}") from None
        name = f"{number}/{shard}/{key}".encode()
        return Document(
            key=key,
            seed=int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little"),
            row=(number, shard, index),
            label=annotations.label,
            targets_PD=states[number].read(shard, index) if states else None,
            **tokens,
        )

    def _paired(self, text: str, number: int, shard: int, index: int, epoch: int) -> str:
        """The text, or by chance, which row and epoch decide: one of its sentences, and below it
        one of a document that lies in the same shard (and so has been found sound)."""
        corpus, row = self.mixture.corpora[number], (number, shard, index, epoch)
        chance, *draws = (int(each) for each in hash64(np.arange(4), self.mixture.seed, *row, -3))
        if chance / 2**64 >= self.mixture.pairs:
            return text
        other = corpus.read(shard, draws[0] % corpus.manifest.shards[shard].samples).text
        sides = []
        for each, draw in zip((text, other), draws[1:]):
            sentences = find_parts(each, "sentences")
            sides.append(each[slice(*sentences[draw % len(sentences)])])
        return "\n".join(sides)

    def _tokens(self, text: str, language: str, annotations: Annotations) -> dict[str, Any]:
        """The fields of a document that the tokenizer gives: of most no more than the ids, which is
        the faster way.
        """
        in_parts = self.mixture.config.parts != "whole"
        if not (annotations.has_ranges or self.mixture.aligns or in_parts):
            student_ids_S, teacher_ids_T = self.mixture.tokenizer(text, language)
            return {"student_ids_S": student_ids_S, "teacher_ids_T": teacher_ids_T}
        student, teacher = self.mixture.tokenizer.example(text, language, annotations)
        return {
            "student_ids_S": student.ids_S,
            "teacher_ids_T": teacher.ids_S,
            "student_spans_P2": student.spans_P2,
            "teacher_spans_P2": teacher.spans_P2,
            "student_answers_A2": student.answers_A2,
            "teacher_answers_A2": teacher.answers_A2,
            "parts_Q2": student.parts_Q2,
            "student_offsets_S2": student.offsets_S2 if annotations.answers else None,
            "teacher_offsets_T2": teacher.offsets_S2 if annotations.answers else None,
            "aligned_S": partners(text, student.offsets_S2, teacher.offsets_S2)
            if self.mixture.aligns
            else None,
        }


class Stream:
    """This rank's lanes r, r + W, ..., read ahead by a thread; `state` is that of the packs given
    out.
    """

    def __init__(self, mixture: Mixture, world: World, prefetch: int) -> None:
        if world.size > mixture.lanes:
            raise ValueError(
                f"{world.size} ranks need at least as many data.lanes; there are {mixture.lanes}"
            )
        self.mixture = mixture
        self.lanes = [
            Lane(mixture, number) for number in range(world.rank, mixture.lanes, world.size)
        ]
        self._states = {lane.number: lane.start() for lane in self.lanes}
        self._prefetch = prefetch
        self._reader: _Reader | None = None

    def next_step(self) -> list[Pack]:
        """One pack from each lane of this rank; none from lanes that have ended.

        Raises:
            ValueError: A shard or document is bad and `data.on_error` is "raise".
        """
        if self._reader is None:
            self._reader = _Reader(self._read_steps(), self._prefetch)
        packs = self._reader.next()
        for lane, pack in zip(self.lanes, packs, strict=True):
            if pack is not None:
                self._states[lane.number] = pack.state
        return [pack for pack in packs if pack is not None]

    def state(self) -> dict[int, dict[str, Any]]:
        """Lane number -> state, for the lanes of this rank."""
        return dict(self._states)

    @property
    def idle(self) -> Document:
        """What a rank without documents runs: a token of weight 0, with all that a document of this
        stream has.
        """
        states = self.mixture.teacher_states
        return replace(
            IDLE,
            aligned_S=np.array([-1], np.int32) if self.mixture.aligns else None,
            targets_PD=states[0].zeros() if states else None,
            parts_Q2=None if self.mixture.config.parts == "whole" else ONE_PART,
        )

    @property
    def skipped(self) -> int:
        """Documents of this rank's lanes that could not be used, since the run's start."""
        return sum(state["skipped"] for state in self._states.values())

    def load_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Continues from the states of all lanes, which any number of ranks may have saved."""
        assert self._reader is None, "load_state comes before the first step"
        self._states = {lane.number: states[lane.number] for lane in self.lanes}

    def close(self) -> None:
        """Ends the reader; what it had read ahead is read again should the stream go on."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_steps(self) -> Iterator[list[Pack | None]]:
        iterators = [lane.packs(self._states[lane.number]) for lane in self.lanes]
        while True:
            yield [next(iterator, None) for iterator in iterators]


class _Reader:
    """A thread that runs an iterator ahead; an exception inside it is raised by `next`."""

    def __init__(self, items: Iterator[Any], ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def next(self) -> Any:
        item, error = self._queue.get()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._put((next(self._items), None)):
                pass
        except (
            Exception
        ) as error:  # handed to the caller of `next`, whatever it is, and again if called again
            while self._put((None, error)):
                pass

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def build_stream(
    config: DataConfig,
    tokenizer: PairTokenizer,
    world: World,
    *,
    seed: int,
    corpus: Path | str | None = None,
    aligns: bool = False,
    labelled: bool = False,
    maker: Mapping[str, Any] | None = None,
) -> Stream:
    """The endless stream of `config.train`, or with `corpus` one pass over that.

    Args:
        aligns: Documents say which of their tokens are partners.
        labelled: A document without a label is a bad one.
        maker: What the stored states `config.teacher_states` must have been made with.

    Raises:
        ValueError: A corpus is missing, its language is unknown, or it has fewer documents than
            there are lanes.
    """
    is_endless = corpus is None
    corpora = tuple(map(Corpus, config.train if corpus is None else (corpus,)))
    for each in corpora:
        tokenizer.student(each.manifest.language)
        samples = each.manifest.samples
        if is_endless and samples < config.lanes:
            too_few = f"fewer than data.lanes={config.lanes}"
            raise ValueError(f"{each.path} has {samples} documents, {too_few}")
    states: tuple[TeacherStates, ...] = ()
    if name := config.teacher_states:
        states = tuple(TeacherStates(each.path, name, maker or {}) for each in corpora)
    sizes = tuple(float(each.manifest.samples) for each in corpora)
    mixture = Mixture(
        corpora=corpora,
        weights=config.mixture if is_endless and config.mixture else sizes,
        tokenizer=tokenizer,
        config=config,
        lanes=config.lanes,
        seed=seed,
        epochs=None if is_endless else 1,
        aligns=aligns,
        labelled=labelled,
        teacher_states=states,
    )
    return Stream(mixture, world, config.prefetch)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What this rank runs in a step, and what all ranks run together."""

    micro_batches: list[list[Document]]
    """Equally many on every rank; where one is empty, `idle` takes its place."""
    idle: Document
    totals: Totals
    """Over all ranks, as the rest."""
    student_tokens: int
    teacher_tokens: int
    skipped: int
    """Documents since the run's start."""
    stop: bool

    def batches(
        self, device: torch.device, step_seed: int = 0
    ) -> Iterator[tuple[list[Document], Batch]]:
        """This rank's micro-batches, one after the other on the device, and what they are made of.

        A rank without documents gets the idle one, so that all make the same ZeRO-3 collectives.
        """
        for documents in self.micro_batches:
            batch = collate(documents, step_seed=step_seed, device=device, idle=self.idle)
            yield documents, batch


def agree(stream: Stream, world: World, max_tokens: int, *, stop: bool = False) -> GlobalBatch:
    """Reads a step and agrees on it with the other ranks, in one small collective.

    Raises:
        ValueError: Reading failed on some rank; every rank raises that rank's error.
    """
    packs: list[Pack] = []
    error: Exception | None = None
    try:
        packs = stream.next_step()
    except (ValueError, OSError) as raised:
        error = raised
    documents = [document for pack in packs for document in pack.documents]
    micro_batches = join(packs, max_tokens)
    counts = [len(micro_batches), *_counts(documents), stream.skipped]
    failed, stops, num_micro, *of_documents, skipped = zip(
        *world.gather_ints([error is not None, stop, *counts])
    )
    if any(failed):
        world.agree_on(error)
    micro_batches += [[] for _ in range(max(num_micro) - len(micro_batches))]
    num_documents, spans, aligned, student_tokens, teacher_tokens = map(sum, of_documents)
    return GlobalBatch(
        micro_batches=micro_batches,
        idle=stream.idle,
        totals=Totals(num_documents, spans, aligned),
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
        skipped=sum(skipped),
        stop=any(stops),
    )


def _counts(documents: Sequence[Document]) -> list[int]:
    """Documents, pooled spans, student tokens with a partner, student tokens, teacher tokens."""
    partners = [document.aligned_S for document in documents if document.aligned_S is not None]
    return [
        len(documents),
        sum(len(document.student_spans_P2) for document in documents),
        sum(int((aligned_S >= 0).sum()) for aligned_S in partners),
        sum(len(document.student_ids_S) for document in documents),
        sum(len(document.teacher_ids_T) for document in documents),
    ]


def each_step(stream: Stream, world: World, max_tokens: int) -> Iterator[GlobalBatch]:
    """A finite stream's steps, until the lanes of every rank have ended; then it is closed.

    Raises:
        ValueError: As `agree`.
    """
    with contextlib.closing(stream):
        while (global_batch := agree(stream, world, max_tokens)).totals.documents:
            yield global_batch


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A permutation of range(size) that is the same on every machine and library version: the order
    of hashes.
    """
    return np.argsort(hash64(np.arange(size), *seeds), kind="stable")


def hash64(values: np.ndarray, *seeds: int) -> np.ndarray:
    """uint64 hashes of integers under a key (splitmix64's finaliser, chained over the key)."""
    x = values.astype(np.uint64)
    for seed in seeds:
        x = _mix64(
            x + _mix64(np.array([seed], np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        )
    return x


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
