"""Text to token ids for both models, cut so that teacher and student read the same characters."""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from mtllm_engine.data.annotations import Annotations, Range, Removed, token_range, token_spans
from mtllm_engine.data.parts import Backend, Parted, PartsTokenizer, cuts
from mtllm_engine.data.pieces import Prefixed, Tokens, around_of, backend_of
from mtllm_engine.data.vocabulary import languages_of, largest_id, load_tokenizer
from mtllm_engine.languages import ENGLISH

Encoded = Encoding | Tokens | Parted
SPECIAL = 2  # around a text that an encoder reads, at most


@dataclass(frozen=True)
class Side:
    """One tokenizer with its special tokens: `prefix + tokens + suffix`."""

    name: str  # of who reads it, in messages
    backend: Backend | PartsTokenizer  # the latter puts special tokens around each part itself
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def encode(self, text: str) -> Encoded:
        return self.backend.encode(text, add_special_tokens=False)

    def ids(self, encoding: Encoded, limit: int) -> np.ndarray:
        """int32 ids, specials included, of the first tokens so that at most `limit` come out."""
        tokens = encoding.ids[: limit - self.num_special]
        return np.array([*self.prefix, *tokens, *self.suffix], dtype=np.int32)

    def offsets(self, encoding: Encoded, limit: int, removed: Removed) -> np.ndarray:
        """The whole text's characters [start, end) of each of the `ids`, int32 (S, 2).

        Those of special tokens are empty.
        """
        body = encoding.offsets[: limit - self.num_special]
        offsets_S2 = np.zeros((self.num_special + len(body), 2), np.int32)
        if body:
            body_S2 = np.array(body, np.int32)
            offsets_S2[len(self.prefix) :][: len(body)] = removed.restored(body_S2)
        return offsets_S2

    def fits(self, encoding: Encoded, limit: int) -> bool:
        return len(encoding.ids) + self.num_special <= limit

    def reach_within(self, encoding: Encoded, limit: int, span: Range) -> int:
        """How many characters of a span may stay, by its tokens' number, for all to fit `limit`."""
        surplus = len(encoding.ids) + self.num_special - limit
        starts = [start for start, end in encoding.offsets if start < span[1] and end > span[0]]
        if surplus <= 0:
            return span[1] - span[0]
        return max(0, starts[-surplus] - span[0]) if surplus <= len(starts) else 0

    def reach(self, encoding: Encoded, limit: int, length: int) -> int:
        """How many of `length` characters come before the first token that does not fit `limit`."""
        fits = self.fits(encoding, limit)
        return length if fits else encoding.offsets[limit - self.num_special][0]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one side reads of an example, special tokens included.

    All is int32; spans, answers and parts are tokens [start, end).
    """

    ids_S: np.ndarray
    offsets_S2: np.ndarray
    """Characters [start, end) of the text, cut or not; of special tokens none."""
    spans_P2: np.ndarray
    """The example's spans, in order and disjoint; the whole text, if it has none."""
    answers_A2: np.ndarray
    """The answers that were not cut away, the same ones on both sides."""
    parts_Q2: np.ndarray | None = None
    """What the encoder reads one by one, the LLM's own tokens being between; None: the text is read
    whole."""
    is_cut: bool = False
    """Whether there is more text than this."""


class PairTokenizer:
    """Tokenises for the student (MT encoder) and the teacher (LLM), each up to `max_length` tokens.

    `aligned`: both read exactly `text[:c]`, c the largest end of a word at which both limits hold
    (the end of a grapheme where words end too rarely: within the last half of what fits there is
    none, as in Chinese or Thai). `independent`: each side keeps its own first tokens, as the
    reference code of arXiv 2406.12739 does.

    Args:
        encoder_prefix: `model.encoder_prefix`.
        parts: `data.parts`. Of a text in parts that is too long `independent` keeps not the first
            tokens, but what `aligned` would for that side alone: each part ends in order.
        reader: Who alone reads a text, "stack" the encoder's tokens or "llm" the LLM's own: it is
            cut for these, and they stand for the side that nobody reads too. None: student and
            teacher both read.
    """

    def __init__(
        self,
        encoder: str | Path,
        decoder: str | Path,
        *,
        max_length: int,
        truncation: str = "aligned",
        parts: str = "whole",
        encoder_prefix: str = "",
        reader: Literal["stack", "llm"] | None = None,
    ) -> None:
        self.reader = reader
        self.encoder_prefix = encoder_prefix
        self.max_length = max_length
        self.truncation = truncation
        self.parts = parts
        self.encoder = load_tokenizer(encoder)
        self.decoder = load_tokenizer(decoder)
        self.languages = languages_of(self.encoder, encoder)
        told = self.languages.is_told
        if reader != "llm" and told and self.encoder.eos_token_id is None:
            fix = "give its tokenizer_config.json the model's, </s> of NLLB"
            raise ValueError(f"the tokenizer in {encoder} has no eos_token; {fix}")
        self.teacher = Side("LLM", self.decoder.backend_tokenizer, *around_of(self.decoder))
        self._students: dict[str, Side] = {}
        taken = backend_of(self.encoder).encode(encoder_prefix, add_special_tokens=False)
        if encoder_prefix and reader != "llm" and len(taken.ids) + SPECIAL >= max_length:
            rest = f"{len(taken.ids)} of data.max_length={max_length} tokens"
            raise ValueError(f"model.encoder_prefix takes {rest}, which leaves no room for a text")

    @property
    def around(self) -> str:
        """What is put around a text that is read, in words: a tokenizer may lack what its model was
        trained with.
        """
        encoder = "encoder" if self.parts == "whole" else f"encoder, {self.parts} one by one"
        names = {"stack": encoder, "llm": "LLM"}
        words = {"stack": self._around_student, "llm": self._around_teacher}
        readers = [self.reader] if self.reader else [*names]
        around = {names[reader]: words[reader]() for reader in readers}
        return "; ".join(
            f"{name}: {' '.join(each) if len(each) > 1 else 'nothing put around them'}"
            for name, each in around.items()
        )

    def _around_teacher(self) -> list[str]:
        return _words(self.decoder, self.teacher.prefix, "...", self.teacher.suffix)

    def _around_student(self) -> list[str]:
        text = f"{self.encoder_prefix}..."
        if not self.languages.is_told:
            return _words(self.encoder, self._untold[0], text, self._untold[1])
        end = self.encoder.eos_token
        return [text, end, "LANGUAGE"] if self.languages.is_last else ["LANGUAGE", text, end]

    @property
    def largest_student_id(self) -> int:
        """That the encoder may be given, in any of its languages."""
        codes = self.languages.tokens if self.languages.is_told else [ENGLISH]
        around = [id for code in codes for ids in self._special(code) for id in ids]
        return largest_id(self.encoder, around)

    @property
    def largest_teacher_id(self) -> int:
        return largest_id(self.decoder, [*self.teacher.prefix, *self.teacher.suffix])

    def student(self, language: str) -> Side:
        """The encoder's side in a source language: its special tokens around the text, or around
        each part.

        Raises:
            ValueError: The code is no language's, or this encoder takes a token and has none for
                it.
        """
        if language not in self._students:
            prefix, suffix = self._special(language)
            bare, text = backend_of(self.encoder), self.encoder_prefix
            backend: Backend = Prefixed(bare, text) if text else bare
            self._students[language] = Side("encoder", backend, prefix, suffix)
            if self.parts != "whole":
                parts = PartsTokenizer(
                    encoder=backend,
                    llm=self.decoder.backend_tokenizer,
                    prefix=prefix,
                    suffix=suffix,
                    kind=self.parts,
                )
                self._students[language] = Side("encoder", parts, (), ())
        return self._students[language]

    def _special(self, language: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the encoder reads before and behind a text in a language: the language's token and
        the end, or what its tokenizer itself puts there.
        """
        token = self.languages.token_of(language)
        if token is None:
            return self._untold
        token_id, end = map(self.encoder.convert_tokens_to_ids, (token, self.encoder.eos_token))
        assert isinstance(token_id, int) and isinstance(end, int)
        return ((), (end, token_id)) if self.languages.is_last else ((token_id,), (end,))

    @functools.cached_property
    def _untold(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return around_of(self.encoder)

    def read_by(
        self, reader: Literal["stack", "llm"] | None, *, truncation: str = ""
    ) -> "PairTokenizer":
        """The same for another `reader`, and for another truncation where one is given."""
        other = copy.copy(self)
        other.reader, other.truncation = reader, truncation or self.truncation
        return other

    def _sides(self, language: str) -> tuple[Side, ...]:
        """Who reads: student and teacher, or the one that stands for both."""
        if self.reader == "llm":
            return (self.teacher,)
        student = self.student(language)
        return (student,) if self.reader == "stack" else (student, self.teacher)

    def __call__(self, text: str, language: str) -> tuple[np.ndarray, np.ndarray]:
        """Student ids (S,) and teacher ids (T,), int32: all there is to say of a document that is
        read whole.
        """
        sides = self._sides(language)
        ids = [
            side.ids(encoding, self.max_length)
            for side, (encoding, _) in zip(sides, self._encode(text, sides))
        ]
        return ids[0], ids[-1]

    def example(
        self, text: str, language: str, annotations: Annotations
    ) -> tuple[Reading, Reading]:
        """Student's and teacher's reading of an example: ids, and its ranges as tokens.

        A token belongs to a range if it overlaps it, white space at the range's ends aside; special
        tokens belong to none. Where the text is too long, `annotations.cut` is shortened from its
        end, at the end of a word or else of a grapheme, until it fits; a text with no ranges is cut
        as a document is. What is too long whatever of `cut` goes is an error, or to a `reader`
        alone its longest parts are shortened alike: an answer is asked for all the same.

        Raises:
            ValueError: A range is not in the text, the text is too long whatever may be shortened,
                or nothing of a span is left to pool.
        """
        annotations.check(text)
        sides = self._sides(language)
        fitted = self._fit(text, sides, annotations)
        removed = [each for _, each in fitted]
        # Of a text that ends early, what is left stands where it stood.
        moved = removed if annotations.has_ranges else [Removed()] * len(removed)
        offsets = [
            side.offsets(encoding, self.max_length, each)
            for side, (encoding, _), each in zip(sides, fitted, moved)
        ]
        answers = _kept_answers(annotations.answers, text, offsets, removed)
        readings = []
        for side, (encoding, cut), offsets_S2, answers_A2 in zip(sides, fitted, offsets, answers):
            ids_S = side.ids(encoding, self.max_length)
            spans_P2 = np.array([[0, len(ids_S)]], np.int32)  # the whole
            if annotations.spans:
                spans_P2 = token_spans(annotations.spans, text, offsets_S2, side.name)
            readings.append(
                Reading(
                    ids_S=ids_S,
                    offsets_S2=offsets_S2,
                    spans_P2=spans_P2,
                    answers_A2=answers_A2,
                    parts_Q2=_parts_of(encoding),
                    is_cut=bool(cut.ranges) or not side.fits(encoding, self.max_length),
                )
            )
        return readings[0], readings[-1]

    def _fit(
        self, text: str, sides: Sequence[Side], annotations: Annotations
    ) -> list[tuple[Encoded, Removed]]:
        """Each side's encoding, and what was taken out of the text for it: if aligned, the same."""
        if not annotations.has_ranges:
            return self._encode(text, sides)
        if self.truncation == "independent":
            alone = [self._encode_shortened(text, [side], annotations) for side in sides]
            return [(encodings[0], removed) for encodings, removed in alone]
        encodings, removed = self._encode_shortened(text, sides, annotations)
        return [(encoding, removed) for encoding in encodings]

    def _encode(self, text: str, sides: Sequence[Side]) -> list[tuple[Encoded, Removed]]:
        encodings, reach = self._encode_head(text, sides)
        if self.truncation == "aligned" and not self._all_fit(sides, encodings):
            return self._encode_cut(text, sides, reach)
        encoded = [(encoding, Removed()) for encoding in encodings]
        for number, (side, encoding) in enumerate(zip(sides, encodings)):
            if isinstance(encoding, Parted) and not side.fits(encoding, self.max_length):
                reach = side.reach(encoding, self.max_length, len(text))
                encoded[number : number + 1] = self._encode_cut(text, [side], reach)
        return encoded

    def _encode_head(self, text: str, sides: Sequence[Side]) -> tuple[list[Encoded], int]:
        """Both encodings of a prefix with more text than fits, and their reach.

        So a book costs no more than a page.
        """
        size = 8 * self.max_length
        common = min if self.truncation == "aligned" else max  # of the two sides' reaches
        while True:
            head = text[:size]
            encodings = [side.encode(head) for side in sides]
            reaches = [
                side.reach(encoding, self.max_length, len(head))
                for side, encoding in zip(sides, encodings)
            ]
            if size >= len(text) or common(reaches) <= size // 2:
                return encodings, common(reaches)
            size *= 2

    def _encode_cut(
        self, text: str, sides: Sequence[Side], reach: int
    ) -> list[tuple[Encoded, Removed]]:
        for cut in cuts(text, reach):
            encodings = [side.encode(text[:cut]) for side in sides]
            if self._all_fit(sides, encodings):
                removed = Removed(((cut, len(text)),))
                return [(encoding, removed) for encoding in encodings]
        limit = f"data.max_length={self.max_length}"
        raise ValueError(f"the first character of the text needs more than {limit} tokens")

    def _encode_shortened(
        self, text: str, sides: Sequence[Side], annotations: Annotations
    ) -> tuple[list[Encoded], Removed]:
        """Encodings of a text, nothing but its `cut` shortened, and what was taken out for it."""
        encodings = [side.encode(text) for side in sides]
        if self._all_fit(sides, encodings):
            return encodings, Removed()
        start, end = annotations.cut or (0, 0)
        shortest = [side.encode(Removed(((start, end),)).without(text)) for side in sides]
        if self.reader and not self._all_fit(sides, shortest):
            return self._encode_pieces(text, sides, annotations)
        if not self._all_fit(sides, shortest):
            limit = f"data.max_length={self.max_length} tokens"
            how = "without what may be shortened of it" if annotations.cut else "and may not be cut"
            raise ValueError(f"the text needs more than {limit} {how}")
        reaches = [
            side.reach_within(encoding, self.max_length, (start, end))
            for side, encoding in zip(sides, encodings)
        ]
        for kept in cuts(text[start:end], min(reaches)):
            removed = Removed(((start + kept, end),))
            encodings = [side.encode(removed.without(text)) for side in sides]
            if self._all_fit(sides, encodings):
                return encodings, removed
        if self.reader and annotations.cut in annotations.spans:  # then something must remain of it
            return self._encode_pieces(text, sides, annotations)
        return shortest, Removed(((start, end),))

    def _encode_pieces(
        self, text: str, sides: Sequence[Side], annotations: Annotations
    ) -> tuple[list[Encoded], Removed]:
        """Encodings of a text, the longest of its pieces shortened alike, and what was taken out.

        Pieces are its spans, its `cut` and what lies between them.
        """
        # A piece may be shortened where one of its tokens starts, as the whole text is tokenised.
        # The first side's tokens are enough: a reader is alone, both sides are the same.
        edges = sorted({0, len(text), *itertools.chain(*annotations.spans, annotations.cut or ())})
        starts = [start for start, end in sides[0].encode(text).offsets if start < end]
        pieces = [
            ([at for at in starts if start <= at < end], end)
            for start, end in itertools.pairwise(edges)
        ]
        # Of every piece its first `kept` tokens remain, the most that fit, so that the longest
        # lose most. Counting rules most numbers out; the others are tried, because what is cut is
        # tokenised anew, into fewer or more.
        room = self.max_length - sides[0].num_special
        for kept in range(room, 0, -1):
            if sum(min(kept, len(of_piece)) for of_piece, _ in pieces) > room:
                continue
            removed = Removed(
                tuple((of_piece[kept], end) for of_piece, end in pieces if len(of_piece) > kept)
            )
            encodings = [side.encode(removed.without(text)) for side in sides]
            if self._all_fit(sides, encodings):
                return encodings, removed
        raise ValueError(
            f"data.max_length={self.max_length} tokens do not hold one of each piece of the text"
        )

    def _all_fit(self, sides: Sequence[Side], encodings: Sequence[Encoded]) -> bool:
        return all(side.fits(encoding, self.max_length) for side, encoding in zip(sides, encodings))


def _kept_answers(
    answers: Sequence[Range], text: str, offsets: Sequence[np.ndarray], removed: Sequence[Removed]
) -> list[np.ndarray]:
    """The tokens of the answers that both sides still read whole: int32 (A, 2) for each side."""
    whole = [answer for answer in answers if not any(cut.touches(answer) for cut in removed)]
    ranges = [[token_range(answer, text, offsets_S2) for offsets_S2 in offsets] for answer in whole]
    kept = [pair for pair in ranges if None not in pair]
    return [
        np.array([pair[side] for pair in kept], np.int32).reshape(-1, 2)
        for side in range(len(offsets))
    ]


def _parts_of(encoding: Encoded) -> np.ndarray | None:
    return np.array(encoding.parts, np.int32) if isinstance(encoding, Parted) else None


def _words(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], text: str, behind: Sequence[int]
) -> list[str]:
    to_words = tokenizer.convert_ids_to_tokens
    return [*to_words(list(before)), text, *to_words(list(behind))]
