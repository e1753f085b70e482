"""Text to token ids for both models, cut at the same character so that teacher and student read the same text."""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtllm_engine.data.languages import check_language, nllb_token

GRAPHEME = regex.compile(r"\X(?=.)", regex.DOTALL)  # not the last one looked at, which may go on
WORD_END = re.compile(r"(?<=\S)(?=\s)")
LONGEST_WORD = 1024  # characters looked at beyond what fits, for the next end of a word


@dataclass(frozen=True)
class Side:
    """One tokenizer with its special tokens: `prefix + tokens + suffix`."""

    backend: Tokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def encode(self, text: str) -> Encoding:
        return self.backend.encode(text, add_special_tokens=False)

    def ids(self, encoding: Encoding, limit: int) -> np.ndarray:
        """int32 ids, specials included, of the first tokens so that at most `limit` come out."""
        tokens = encoding.ids[: limit - self.num_special]
        return np.array([*self.prefix, *tokens, *self.suffix], dtype=np.int32)

    def fits(self, encoding: Encoding, limit: int) -> bool:
        return len(encoding.ids) + self.num_special <= limit

    def reach(self, encoding: Encoding, limit: int, length: int) -> int:
        """How many of a text's `length` characters come before the first token that does not fit `limit`."""
        return length if self.fits(encoding, limit) else encoding.offsets[limit - self.num_special][0]


class PairTokenizer:
    """Tokenises a document for the student (MT encoder) and the teacher (LLM), each at most `max_length` tokens.

    `aligned`: both read exactly `text[:c]`, c the largest end of a word at which both limits hold (the end of a
    grapheme where words end too rarely: within the last half of what fits there is none, as in Chinese or Thai).
    `independent`: each side keeps its own first tokens, as the reference code of arXiv 2406.12739 does.
    """

    def __init__(
        self, encoder: str | Path, decoder: str | Path, *, max_length: int, truncation: str = "aligned"
    ) -> None:
        self.max_length = max_length
        self.truncation = truncation
        self.encoder = load_tokenizer(encoder)
        self.decoder = load_tokenizer(decoder)
        self.teacher = _plain_side(self.decoder)
        self._students: dict[str, Side] = {}

    @property
    def languages(self) -> frozenset[str]:
        """The encoder's language tokens."""
        return frozenset(token for token in self.encoder.get_vocab() if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", token))

    @property
    def largest_student_id(self) -> int:
        return max(self.encoder.get_vocab().values())

    @property
    def largest_teacher_id(self) -> int:
        return max(self.decoder.get_vocab().values())

    def student(self, language: str) -> Side:
        """The encoder's side in one source language: language token, text, `</s>` (NLLB's source format).

        Raises:
            ValueError: The code is not a FLORES-200 code, or this encoder has no token for it.
        """
        if language not in self._students:
            token = nllb_token(check_language(language))
            if token not in self.languages:
                raise ValueError(f"the encoder's tokenizer has no token for the language {language}")
            prefix = (self.encoder.convert_tokens_to_ids(token),)
            self._students[language] = Side(self.encoder.backend_tokenizer, prefix, (self.encoder.eos_token_id,))
        return self._students[language]

    def __call__(self, text: str, language: str) -> tuple[np.ndarray, np.ndarray]:
        """Student ids (S,) and teacher ids (T,), int32."""
        sides = (self.student(language), self.teacher)
        encodings, reach = self._encode_head(text, sides)
        if self.truncation == "aligned" and not self._all_fit(sides, encodings):
            encodings = self._encode_cut(text, sides, reach)
        student_ids, teacher_ids = (side.ids(encoding, self.max_length) for side, encoding in zip(sides, encodings))
        return student_ids, teacher_ids

    def _encode_head(self, text: str, sides: Sequence[Side]) -> tuple[list[Encoding], int]:
        """Both encodings of a prefix with more text than fits, and their reach: a book costs no more than a page."""
        size = 8 * self.max_length
        common = min if self.truncation == "aligned" else max  # how far one side reaches, or the other one too
        while True:
            head = text[:size]
            encodings = [side.encode(head) for side in sides]
            reaches = [side.reach(encoding, self.max_length, len(head)) for side, encoding in zip(sides, encodings)]
            if size >= len(text) or common(reaches) <= size // 2:
                return encodings, common(reaches)
            size *= 2

    def _encode_cut(self, text: str, sides: Sequence[Side], reach: int) -> list[Encoding]:
        for cut in _cuts(text, reach):
            encodings = [side.encode(text[:cut]) for side in sides]
            if self._all_fit(sides, encodings):
                return encodings
        raise ValueError(f"the first character of the text needs more than data.max_length={self.max_length} tokens")

    def _all_fit(self, sides: Sequence[Side], encodings: Sequence[Encoding]) -> bool:
        return all(side.fits(encoding, self.max_length) for side, encoding in zip(sides, encodings))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer, from its folder or the hub.

    Raises:
        ValueError: There is none, or it has no Rust backend.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {folder}: {reason}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens) | set(tokenizer.added_tokens_encoder):
        raise ValueError(f"the tokenizer in {folder} has no words: is its tokenizer.json missing?")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} has no fast (tokenizers) version")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _plain_side(tokenizer: PreTrainedTokenizerFast) -> Side:
    """The special tokens that a tokenizer puts around a text by itself, found by looking."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return Side(tokenizer.backend_tokenizer, tuple(full[:start]), tuple(full[start + len(bare) :]))


def _cuts(text: str, reach: int) -> Iterator[int]:
    """Where a text may be cut, best first: ends of words from just beyond `reach` down, then ends of graphemes.

    Cut at the end of a word, what is before has hardly other tokens than in the whole text; cut inside a word, its last
    characters merge anew, into fewer tokens at times. So one word and two graphemes beyond `reach` are tried too, and
    the first few candidates nearly always hold the largest that fits.
    """
    yield from (end for end in _ends(WORD_END, text, reach, beyond=1) if 2 * end >= reach)
    yield from _ends(GRAPHEME, text, reach, beyond=2)


def _ends(unit: re.Pattern, text: str, reach: int, *, beyond: int) -> list[int]:
    """Where units of a text end, from the last of `beyond` ones after `reach` down."""
    ends = [match.end() for match in unit.finditer(text, 0, reach + LONGEST_WORD)]
    return ends[: bisect.bisect_right(ends, reach) + beyond][::-1]
