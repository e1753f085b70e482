"""Texts as tokens: what the encoder reads of a text in a language, and what the LLM itself does."""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .parts import Backend, Parted, PartsTokenizer, cuts
from .pieces import Prefixed, Tokens, around_of, backend_of, only_read

NLLB = {"sat_Olck": "sat_Beng"}  # its vocabulary names Santali by the wrong script
Encoded = Encoding | Tokens | Parted
SEPARATOR = "\n"  # between the two texts of a pair


class Side(NamedTuple):
    """A tokenizer with its special tokens and its limit: how encoder or LLM reads a text."""

    backend: Backend | PartsTokenizer  # the latter puts special tokens around each part itself
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    max_length: int
    ends_with_words: bool  # where it is too long

    def read(self, text: str, rest: str = "") -> tuple[list[int], list[int]]:
        """Token ids, and the number of the part that each is in, from 1; 0 for the LLM's own tokens
        between parts. Where text and rest together are too long, the text is cut.
        """
        encoding = self._fitted(text, rest)
        ids = [*self.prefix, *encoding.ids[: self._room], *self.suffix]
        spans = encoding.parts if isinstance(encoding, Parted) else [(0, len(ids))]
        part_ids = [0] * len(ids)
        for number, (start, end) in enumerate(spans, 1):
            part_ids[start:end] = [number] * (end - start)
        return ids, part_ids

    @property
    def _room(self) -> int:
        return self.max_length - len(self.prefix) - len(self.suffix)

    def _fitted(self, text: str, rest: str) -> Encoded:
        # No more of a book is looked at than of a page.
        size = len(text) if rest else 8 * self.max_length
        while True:
            head = text[:size]
            encoding = self._encode(head + rest)
            reach = self._reach(encoding, len(head), bool(rest))
            if size >= len(text) or reach <= size // 2:
                break
            size *= 2
        if self._fits(encoding) or not (rest or self.ends_with_words):
            return encoding
        for cut in itertools.chain(cuts(text, reach), [0] if rest else []):
            shorter = self._encode(text[:cut] + rest)
            if self._fits(shorter):
                return shorter
        what = "the second text of a pair" if rest else "the first character of a text"
        raise ValueError(f"{what} needs more than {self.max_length} tokens")

    def _encode(self, text: str) -> Encoded:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has surrogates, halves of characters; drop them") from None
        return self.backend.encode(text, add_special_tokens=False)

    def _fits(self, encoding: Encoded) -> bool:
        return len(encoding.ids) <= self._room

    def _reach(self, encoding: Encoded, length: int, has_rest: bool) -> int:
        """How many of a text's `length` characters may stay, by the number of tokens."""
        surplus = len(encoding.ids) - self._room
        if surplus <= 0:
            return length
        if not has_rest:
            return encoding.offsets[self._room][0]
        starts = [start for start, end in encoding.offsets if start < length and end > 0]
        return starts[-surplus] if surplus <= len(starts) else 0


def open_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """That takes a text for a text. Args: options: of `AutoTokenizer.from_pretrained`."""
    tokenizer = AutoTokenizer.from_pretrained(name, split_special_tokens=True, **options)
    if isinstance(tokenizer, PreTrainedTokenizerFast):  # M2M-100's is none
        only_read(tokenizer)
    return tokenizer


def student_side(
    config: PreTrainedConfig,
    encoder: PreTrainedTokenizerBase,
    llm: PreTrainedTokenizerFast,
    language: str | None,
) -> Side:
    """How the encoder reads texts of a language.

    Raises:
        ValueError: It is missing or unknown.
    """
    prefix, suffix = _around(config, encoder, language)
    backend = backend_of(encoder)
    backend = Prefixed(backend, config.encoder_prefix) if config.encoder_prefix else backend
    if config.parts == "whole":
        is_aligned = config.truncation == "aligned"
        return Side(backend, prefix, suffix, config.max_length, is_aligned)
    tokenizers = {"encoder": backend, "llm": llm.backend_tokenizer}
    parts = PartsTokenizer(**tokenizers, prefix=prefix, suffix=suffix, kind=config.parts)
    return Side(parts, (), (), config.max_length, True)


def _around(
    config: PreTrainedConfig, encoder: PreTrainedTokenizerBase, language: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and behind a text, or each part of it."""
    tokens = config.language_tokens
    if tokens == {}:  # it is not told the language, whichever it is
        return around_of(encoder)
    code = language or config.default_language
    if not code:
        raise ValueError('say the language of the texts, such as language="swh_Latn"')
    if code not in config.languages and code not in config.fallback:
        near = sorted(config.languages, key=lambda known: _likeness(code, known), reverse=True)
        raise ValueError(f"unknown language {code!r}; did you mean {', '.join(near[:3])}?")
    code = code if code in config.languages else config.fallback[code]
    token = NLLB.get(code, code) if tokens is None else tokens[code]
    token_id, end = encoder.convert_tokens_to_ids(token), encoder.eos_token_id
    return ((), (end, token_id)) if config.language_last else ((token_id,), (end,))


def teacher_side(config: PreTrainedConfig, llm: PreTrainedTokenizerFast) -> Side:
    """How the LLM itself reads texts.

    Raises:
        ValueError: There is no teacher.
    """
    if not config.teacher:
        lack = "the adapters are merged into the LLM, so the teacher is no longer there"
        raise ValueError(f'reader="teacher": {lack}; use a folder that is not merged')
    is_aligned = config.truncation == "aligned"
    return Side(llm.backend_tokenizer, *around_of(llm), config.max_length, is_aligned)


def _likeness(typed: str, code: str) -> tuple[float, float]:
    """How alike the languages are, then the codes: half of all end in _Latn, which says little."""
    pairs = ((typed.partition("_")[0], code.partition("_")[0]), (typed, code))
    by_language, by_code = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
    return by_language, by_code


def padded(readings: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Ids and parts of texts, and which are any, padded with 0 at the right."""
    rows = [(ids, [1] * len(ids), part_ids) for ids, part_ids in readings]
    longest = max((len(ids) for ids, _ in readings), default=0)
    padded = torch.tensor([[each + [0] * (longest - len(each)) for each in row] for row in rows])
    names = ("input_ids", "attention_mask", "part_ids")
    return dict(zip(names, padded.view(-1, 3, longest).unbind(1)))
