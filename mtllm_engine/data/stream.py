"""Lanes: what step k trains on, whatever the number of ranks.

An epoch's samples are numbered along its seeded shard permutation and, inside each shard, along a permutation of its
own. Lane l owns the numbers [l*n/lanes, (l+1)*n/lanes) and packs its documents in that order; a step consumes one pack
from every lane. A lane's state is the position after its last consumed pack; nothing else is hidden anywhere.
"""

import functools
import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.config import DataConfig
from mtllm_engine.data.batch import IDLE, Document, Pack, Totals, join
from mtllm_engine.data.marks import Marks, partners
from mtllm_engine.data.shards import BadDocument, Corpus, DamagedShard
from mtllm_engine.data.targets import Targets
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.world import World

BARREN_EPOCHS = 16  # how often a lane may pass over nothing but damaged shards; each epoch gives it others


class Order:
    """The numbering of a corpus' samples in each epoch: `locate(epoch, number) -> (shard, index)`."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self._shards = functools.lru_cache(maxsize=4)(self._shard_permutation)
        self._samples = functools.lru_cache(maxsize=256)(self._sample_permutation)

    def locate(self, epoch: int, number: int) -> tuple[int, int]:
        shards, ends = self._shards(epoch)
        place = int(np.searchsorted(ends, number, side="right"))
        shard = int(shards[place])
        index = number - int(ends[place] - self.sizes[shard])
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
    targets: tuple[Targets, ...] = ()  # stored states of the teacher, by corpus
    orders: tuple[Order, ...] = field(init=False)

    def __post_init__(self) -> None:
        orders = tuple(Order([shard.samples for shard in corpus.manifest.shards], self.seed) for corpus in self.corpora)
        object.__setattr__(self, "orders", orders)

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
    """One lane: its documents, in order, and its packs. State: `draws`, `skipped`, and (epoch, position) by corpus."""

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
        yield Pack(documents=tuple(documents), state=state)  # a finite lane's last: perhaps none, but its skips count

    def documents(self, state: dict[str, Any]) -> Iterator[tuple[Document | None, dict[str, Any]]]:
        """The documents from `state` on, None for a skipped one, each with the state after it."""
        barren = 0
        owned = sum(end - start for start, end in self.bounds)
        while (step := self._advance(state)) is not None:
            corpus, epoch, number, state = step
            document = self._read(corpus, epoch, number)
            barren = 0 if document is not None else barren + 1
            if barren > BARREN_EPOCHS * owned and self.mixture.epochs is None:
                raise ValueError(f"lane {self.number} has no usable document: {barren} in a row were skipped")
            state["skipped"] += document is None
            yield document, state

    def _advance(self, state: dict[str, Any]) -> tuple[int, int, int, dict[str, Any]] | None:
        """The next sample's corpus, epoch and number in it, and the state after it; None where a finite lane ends."""
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

    def _read(self, place: int, epoch: int, number: int) -> Document | None:
        shard, index = self.mixture.orders[place].locate(epoch, number)
        try:
            return self._tokenised(place, shard, index)
        except (DamagedShard, BadDocument):
            if self.mixture.config.on_error == "raise":
                raise
            return None

    def _tokenised(self, place: int, shard: int, index: int) -> Document:
        corpus = self.mixture.corpora[place]
        (key, text), marks = corpus.read_example(shard, index)
        try:
            if self.mixture.labelled and marks.label < 0:
                raise ValueError('it has no label to learn; leave it out, or set data.on_error="skip"')
            tokens = self._tokens(text, corpus.manifest.language, marks)
        except ValueError as error:
            raise BadDocument(f"shard {corpus.path / corpus.manifest.shards[shard].name}, key {key}: {error}") from None
        seed = int.from_bytes(hashlib.blake2b(f"{place}/{shard}/{key}".encode(), digest_size=4).digest(), "little")
        targets_PD = self.mixture.targets[place].read(shard, index) if self.mixture.targets else None
        row = (place, shard, index)
        return Document(key=key, seed=seed, row=row, label=marks.label, targets_PD=targets_PD, **tokens)

    def _tokens(self, text: str, language: str, marks: Marks) -> dict[str, np.ndarray | None]:
        """The fields of a document that the tokenizer gives: of most no more than the ids, which is the faster way."""
        if not (marks.has_ranges or self.mixture.aligns):
            student_ids_S, teacher_ids_T = self.mixture.tokenizer(text, language)
            return {"student_ids_S": student_ids_S, "teacher_ids_T": teacher_ids_T}
        student, teacher = self.mixture.tokenizer.example(text, language, marks)
        return {
            "student_ids_S": student.ids_S,
            "teacher_ids_T": teacher.ids_S,
            "student_spans_P2": student.spans_P2,
            "teacher_spans_P2": teacher.spans_P2,
            "student_answers_A2": student.answers_A2,
            "teacher_answers_A2": teacher.answers_A2,
            "student_offsets_S2": student.offsets_S2 if marks.answers else None,
            "teacher_offsets_T2": teacher.offsets_S2 if marks.answers else None,
            "aligned_S": partners(text, student.offsets_S2, teacher.offsets_S2) if self.mixture.aligns else None,
        }


class Stream:
    """This rank's lanes r, r + W, ..., read ahead by a thread; `state` is that of the packs given out."""

    def __init__(self, mixture: Mixture, world: World, prefetch: int) -> None:
        if world.size > mixture.lanes:
            raise ValueError(f"{world.size} ranks need at least as many data.lanes; there are {mixture.lanes}")
        self.mixture = mixture
        self.lanes = [Lane(mixture, number) for number in range(world.rank, mixture.lanes, world.size)]
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
        """What a rank without documents runs: a token of weight 0, with all that a document of this stream has."""
        aligned_S = np.array([-1], np.int32) if self.mixture.aligns else None
        targets = self.mixture.targets
        return replace(IDLE, aligned_S=aligned_S, targets_PD=targets[0].zeros() if targets else None)

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
        except Exception as error:  # handed to the caller of `next`, whatever it is, and again if called again
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
    epochs: int | None = None,
    aligns: bool = False,
    labelled: bool = False,
    maker: Mapping[str, Any] | None = None,
) -> Stream:
    """The endless training stream, or with `epochs` the finite one over `data.validation`.

    Args:
        aligns: Documents say which of their tokens are partners.
        labelled: A document without a label is a bad one.
        maker: What the stored states `data.targets` must have been made with.

    Raises:
        ValueError: A corpus is missing, its language is unknown, or it has fewer documents than there are lanes.
    """
    paths = config.train if epochs is None else (config.validation,)
    corpora = tuple(Corpus(Path(path)) for path in paths)
    for corpus in corpora:
        tokenizer.student(corpus.manifest.language)
        if epochs is None and corpus.manifest.samples < config.lanes:
            raise ValueError(
                f"{corpus.path} has {corpus.manifest.samples} documents, fewer than data.lanes={config.lanes}"
            )
    weights = config.weights if epochs is None and config.weights else tuple(c.manifest.samples for c in corpora)
    mixture = Mixture(
        corpora=corpora,
        weights=weights,
        tokenizer=tokenizer,
        config=config,
        lanes=config.lanes,
        seed=seed,
        epochs=epochs,
        aligns=aligns,
        labelled=labelled,
        targets=tuple(Targets(Path(path), config.targets, maker or {}) for path in paths) if config.targets else (),
    )
    return Stream(mixture, world, config.prefetch)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What this rank runs in a step, and what all ranks run together."""

    micro_batches: list[list[Document]]  # equally many on every rank; the last may be empty, and `idle` takes its place
    idle: Document
    totals: Totals  # over all ranks, as the rest
    student_tokens: int
    teacher_tokens: int
    skipped: int  # documents since the run's start
    stop: bool


def agree(stream: Stream, world: World, max_tokens: int, *, stop: bool = False) -> Step:
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
    spans = sum(len(document.student_spans_P2) for document in documents)
    aligned = sum(int((document.aligned_S >= 0).sum()) for document in documents if document.aligned_S is not None)
    student_tokens = sum(len(document.student_ids_S) for document in documents)
    teacher_tokens = sum(len(document.teacher_ids_T) for document in documents)
    counts = [len(micro_batches), len(documents), spans, aligned, student_tokens, teacher_tokens, stream.skipped]
    ranks = world.gather_ints([error is not None, stop, *counts])
    failed, stopped, num_micro, num_documents, num_spans, num_aligned, num_student, num_teacher, skipped = zip(*ranks)
    if any(failed):
        world.agree_on(error)
    micro_batches += [[] for _ in range(max(num_micro) - len(micro_batches))]
    return Step(
        micro_batches=micro_batches,
        idle=stream.idle,
        totals=Totals(sum(num_documents), sum(num_spans), sum(num_aligned)),
        student_tokens=sum(num_student),
        teacher_tokens=sum(num_teacher),
        skipped=sum(skipped),
        stop=any(stopped),
    )


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A permutation of range(size) that is the same on every machine and library version: the order of hashes."""
    return np.argsort(hash64(np.arange(size), *seeds), kind="stable")


def hash64(values: np.ndarray, *seeds: int) -> np.ndarray:
    """uint64 hashes of integers under a key (splitmix64's finaliser, chained over the key)."""
    x = values.astype(np.uint64)
    for seed in seeds:
        x = _mix64(x + _mix64(np.array([seed], np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return x


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
