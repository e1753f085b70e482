"""The documents of a benchmark's steps: random token ids at realistic lengths, alike for all; in
parts also random sentences and lines.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mtllm_engine.data.batch import IDLE, ONE_PART, Document, Pack
from mtllm_engine.data.stream import GlobalBatch, agree
from mtllm_engine.world import World

SIGMA = 0.8  # of the log of a document's length
# Encoder tokens per LLM token of one text: two tokenizers never cut alike.
RATIO, RATIO_SIGMA = 1.1, 0.1
# Below lie special tokens; transformers' M2M-100 numbers positions by what is not <pad>.
FIRST_ID = 4
SHORTEST = 2  # a special token and a word
SPECIAL = 2  # the encoder's, around each part
SENTENCE, LINE = 25, 4  # encoder tokens of a sentence, as the median; sentences of a line


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
    parts: str = "whole"  # data.parts

    def global_batches(self, count: int, world: World, max_tokens: int) -> list[GlobalBatch]:
        """The first steps, agreed between the ranks as in training."""
        return [
            agree(_Ready(self._packs(step, world.rank), self.parts), world, max_tokens)
            for step in range(count)
        ]

    def _packs(self, step: int, rank: int) -> list[Pack]:
        generator = np.random.default_rng((step, rank, self.lengths.median))
        return [Pack(documents=(document,), state={}) for document in self._documents(generator)]

    def _documents(self, generator: np.random.Generator) -> Iterator[Document]:
        room = np.array([self.tokens, self.tokens])
        while True:
            student, teacher = (
                generator.integers(FIRST_ID, vocab, size, dtype=np.int32)
                for vocab, size in zip(self.vocabularies, self.lengths.draw(generator))
            )
            seed = int(generator.integers(2**32))
            ids = {"student_ids_S": student, "teacher_ids_T": teacher}
            if self.parts != "whole":
                ids = self._in_parts(np.random.default_rng(seed), student, teacher)
            sizes = np.array([len(ids["student_ids_S"]), len(ids["teacher_ids_T"])])
            if (sizes > room).any():
                return
            room -= sizes
            yield Document(key=str(seed), seed=seed, **ids)

    def _in_parts(
        self, generator: np.random.Generator, student_S: np.ndarray, teacher_T: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The same text in random sentences and lines, or as much of it as leaves room for what
        stands around and between them.
        """
        num_text = max(1, len(student_S) - SPECIAL)
        drawn = generator.lognormal(math.log(SENTENCE), SIGMA / 2, num_text).round()
        ends_Q = np.unique(np.minimum(np.cumsum(np.maximum(1, drawn)), num_text)).astype(int)
        is_line_Q = np.arange(1, len(ends_Q) + 1) % LINE == 0
        is_line_Q[-1] = True
        if self.parts == "lines":
            ends_Q, is_line_Q = ends_Q[is_line_Q], is_line_Q[is_line_Q]
        # A part's tokens with the special ones, and behind all lines but the last a newline.
        lengths_Q = np.diff(ends_Q, prepend=0) + SPECIAL
        starts_Q = np.cumsum(lengths_Q + is_line_Q) - lengths_Q - is_line_Q
        surplus = int(starts_Q[-1] + lengths_Q[-1]) - self.lengths.longest
        if surplus > 0:
            kept = max(SHORTEST, round(len(teacher_T) * max(1, num_text - surplus) / num_text))
            return self._in_parts(generator, student_S[:-surplus], teacher_T[:kept])
        ids_S = np.resize(student_S, starts_Q[-1] + lengths_Q[-1])
        return {
            "student_ids_S": ids_S % min(self.vocabularies),  # some are the LLM's
            "teacher_ids_T": teacher_T,
            "parts_Q2": np.stack([starts_Q, starts_Q + lengths_Q], axis=1),
        }


class _Ready:
    """A stream of one step that is there already."""

    skipped = 0

    def __init__(self, packs: list[Pack], parts: str) -> None:
        self.next_step = lambda: packs
        self.idle = replace(IDLE, parts_Q2=None if parts == "whole" else ONE_PART)
