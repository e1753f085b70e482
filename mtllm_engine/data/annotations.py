"""What an example says about its text: its label, and the characters that matter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Range = tuple[int, int]  # characters [start, end) of a text
ANNOTATIONS = ("label", "spans", "answers", "cut")  # their names, in manifests too


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Ranges are characters [start, end) of the text; a plain text of a corpus has none of them."""

    label: int = -1
    """Index of the class or of the right choice; -1: not given."""
    spans: tuple[Range, ...] = ()
    """What is pooled, in order and disjoint; empty: the whole text."""
    answers: tuple[Range, ...] = ()
    """The accepted answers, where a task asks for a piece of the text."""
    cut: Range | None = None
    """What may be shortened where the text is too long; None: the text's end, if no spans."""

    @property
    def has_ranges(self) -> bool:
        return bool(self.spans or self.answers or self.cut)

    def check(self, text: str) -> None:
        """Raises ValueError unless every range lies in the text and the spans are in order."""
        cut = (self.cut,) if self.cut else ()
        for name, ranges in (("spans", self.spans), ("answers", self.answers), ("cut", cut)):
            for start, end in ranges:
                if not 0 <= start <= end <= len(text):
                    raise ValueError(
                        f"{name}: [{start}, {end}) is not in the text's {len(text)} characters"
                    )
        for (_, end), (start, _) in zip(self.spans, self.spans[1:]):
            if start < end:
                raise ValueError(
                    f"spans: one starts at {start}, before the one before it ends at {end}"
                )


NO_ANNOTATIONS = Annotations()


class Removed(NamedTuple):
    """What was taken out of a text to make it fit."""

    ranges: tuple[Range, ...] = ()  # in order and disjoint

    def without(self, text: str) -> str:
        for start, end in reversed(self.ranges):
            text = text[:start] + text[end:]
        return text

    def touches(self, span: Range) -> bool:
        return any(span[0] < end and start < span[1] for start, end in self.ranges)

    def restored(self, offsets_S2: np.ndarray) -> np.ndarray:
        """Ranges of what is left, as ranges of the text."""
        for start, end in self.ranges:
            starts_S, ends_S = offsets_S2.T
            is_behind_S2 = np.stack([starts_S >= start, ends_S > start], axis=1)
            offsets_S2 = offsets_S2 + (end - start) * is_behind_S2
        return offsets_S2


def token_range(span: Range, text: str, offsets_S2: np.ndarray) -> Range | None:
    """The tokens from the first to the last that overlap a range of characters; None if none does.

    White space at its ends does not count: the token of the next word may have it (`▁b`, `Ġb`).
    """
    start, end = span
    start, end = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())
    starts_S, ends_S = offsets_S2.T
    hits = np.flatnonzero((starts_S < end) & (ends_S > start) & (starts_S < ends_S))
    return (int(hits[0]), int(hits[-1]) + 1) if len(hits) else None


def token_spans(
    spans: Sequence[Range], text: str, offsets_S2: np.ndarray, reader: str
) -> np.ndarray:
    """`token_range` of each span, int32 (P, 2).

    Raises:
        ValueError: A span has no token of its own, and so nothing to pool.
    """
    ranges: list[Range] = []
    for span in spans:
        tokens = token_range(span, text, offsets_S2)
        if tokens is None:
            raise ValueError(f"the {reader} has no token for the span {_shown(span, text)}")
        if ranges and tokens[0] < ranges[-1][1]:
            both = f"in the span {_shown(span, text)} and in the one before it"
            raise ValueError(f"one token of the {reader} is {both}")
        ranges.append(tokens)
    return np.array(ranges, np.int32).reshape(-1, 2)


def partners(
    text: str, student_offsets_S2: np.ndarray, teacher_offsets_T2: np.ndarray
) -> np.ndarray:
    """Each student token's partner among the teacher's tokens, or -1, int32 (S,).

    Partners are tokens of the same characters, white space at their ends aside, where both
    tokenizers made one token of them: the pieces of one character (byte fallback) have none.
    Source: the authors' second recipe of arXiv 2406.12739.
    """
    (student, student_tokens), (teacher, teacher_tokens) = (
        _distinct_cores(text, offsets_S2) for offsets_S2 in (student_offsets_S2, teacher_offsets_T2)
    )
    _, among_student, among_teacher = np.intersect1d(
        student, teacher, assume_unique=True, return_indices=True
    )
    aligned_S = np.full(len(student_offsets_S2), -1, np.int32)
    aligned_S[student_tokens[among_student]] = teacher_tokens[among_teacher]
    return aligned_S


def _distinct_cores(text: str, offsets_S2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cores (ranges without white space at their ends) of one token alone, and those tokens.

    A core is one number, so that both tokenizers' cores are compared as sorted arrays.
    """
    # For every character the next and the last one that is no space, itself included: where a core
    # starts and ends is then one look-up for all tokens at once.
    is_space = np.array([character.isspace() for character in text] + [False])
    indices = np.arange(len(is_space))
    backwards = np.where(is_space, len(text), indices)[::-1]
    following = np.minimum.accumulate(backwards)[::-1]
    preceding = np.maximum.accumulate(np.where(is_space, -1, indices))
    # The number of a core [start, end): start * size + end. A token of white space, or of nothing
    # (a special one), has none: its "end" is not behind its "start".
    starts_S, ends_S = offsets_S2.astype(np.int64).T
    cores_S = following[starts_S] * len(is_space) + preceding[np.maximum(ends_S - 1, 0)] + 1
    is_text_S = (ends_S > starts_S) & (cores_S % len(is_space) > cores_S // len(is_space))
    # Tokens that share a core are pieces of one character (byte fallback): nobody's partner.
    cores, first, counts = np.unique(cores_S[is_text_S], return_index=True, return_counts=True)
    return cores[counts == 1], np.flatnonzero(is_text_S)[first[counts == 1]]


def _shown(span: Range, text: str) -> str:
    return repr(text[slice(*span)][:40])


def parse_annotations(values: Mapping[str, Any]) -> Annotations:
    """Annotations from their JSON values, by name; what is not there keeps its default.

    Raises:
        ValueError: A value is not of its kind; the message names it.
    """
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name == "label":
            parsed[name] = _whole_number(name, value)
        elif name == "cut":
            parsed[name] = None if value is None else _range(name, value)
        else:
            parsed[name] = _ranges(name, value)
    return Annotations(**parsed)


def _whole_number(name: str, value: Any) -> int:
    if type(value) is not int or value < -1:
        raise ValueError(f"{name} should be a whole number, -1 or above, not {value!r}")
    return value


def _ranges(name: str, value: Any) -> tuple[Range, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise ValueError(f"{name} should be a list of [start, end), not {value!r}")
    return tuple(_range(name, item) for item in value)


def _range(name: str, value: Any) -> Range:
    if not isinstance(value, list) or len(value) != 2 or any(type(x) is not int for x in value):
        raise ValueError(f"{name} should hold [start, end) of two whole numbers, not {value!r}")
    return value[0], value[1]
