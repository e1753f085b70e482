"""The documents of a benchmark's steps: random token ids at realistic lengths, alike for all."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtllm_engine.data.batch import IDLE, Document, Pack
from mtllm_engine.data.stream import GlobalBatch, agree
from mtllm_engine.world import World

SIGMA = 0.8  # of the log of a document's length
# Encoder tokens per LLM token of one text: two tokenizers never cut alike.
RATIO, RATIO_SIGMA = 1.1, 0.1
# Below lie special tokens; transformers' M2M-100 numbers positions by what is not <pad>.
FIRST_ID = 4
SHORTEST = 2  # a special token and a word


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long documents are: log-normal around a median number of LLM tokens, or all equally long.

    What is above `longest` on either side is cut on both at the same place of the text, as aligned
    truncation does.
    """

    median: int  # 0: every document has `longest` tokens on each side
    longest: int

    def draw(self, generator: np.random.Generator) -> tuple[int, int]:
        """Student and teacher tokens of one document."""
        if not self.median:
            return self.longest, self.longest
        teacher = generator.lognormal(math.log(self.median), SIGMA)
        student = teacher * RATIO * math.exp(RATIO_SIGMA * generator.standard_normal())
        kept = min(1.0, self.longest / max(student, teacher))
        return max(SHORTEST, round(student * kept)), max(SHORTEST, round(teacher * kept))


def parse_lengths(text: str, longest: int) -> Lengths:
    """Raises: ValueError: Not `equal` nor a median that `longest` leaves room for."""
    if text == "equal":
        return Lengths(median=0, longest=longest)
    if not text.isdigit() or not SHORTEST <= int(text) <= longest:
        limits = f"from {SHORTEST} to data.max_length={longest}"
        raise ValueError(f"--lengths {text}: write equal, or a median {limits}")
    return Lengths(median=int(text), longest=longest)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Steps of random documents: on each rank as many as fit `tokens` on both sides. Stands in for
    a data stream.
    """

    lengths: Lengths
    tokens: int  # of one rank and step, on each side
    vocabularies: tuple[int, int]  # of student and teacher

    def global_batches(self, count: int, world: World, max_tokens: int) -> list[GlobalBatch]:
        """The first steps, agreed between the ranks as in training."""
        return [
            agree(_Ready(self._packs(step, world.rank)), world, max_tokens) for step in range(count)
        ]

    def _packs(self, step: int, rank: int) -> list[Pack]:
        generator = np.random.default_rng((step, rank, self.lengths.median))
        return [Pack(documents=(document,), state={}) for document in self._documents(generator)]

    def _documents(self, generator: np.random.Generator) -> Iterator[Document]:
        room = np.array([self.tokens, self.tokens])
        while ((sizes := np.array(self.lengths.draw(generator))) <= room).all():
            room -= sizes
            student, teacher = (
                generator.integers(FIRST_ID, vocab, size, dtype=np.int32)
                for vocab, size in zip(self.vocabularies, sizes)
            )
            seed = int(generator.integers(2**32))
            yield Document(key=str(seed), seed=seed, student_ids_S=student, teacher_ids_T=teacher)


class _Ready:
    """A stream of one step that is there already."""

    skipped = 0
    idle = IDLE

    def __init__(self, packs: list[Pack]) -> None:
        self.next_step = lambda: packs
