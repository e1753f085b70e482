"""A tokenizer made to read texts and no more, and what takes a `Tokenizer`'s place for an encoder
whose texts are not simply handed to one.

An exported folder carries this file as it is, so it imports nothing of ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Range = tuple[int, int]  # characters [start, end) of a text


@dataclass(frozen=True)
class Tokens:
    """As an `Encoding` has them."""

    ids: Sequence[int]
    offsets: Sequence[Range]


class SentencePieces:
    """M2M-100's tokenizer, of which `tokenizers` has none: the pieces that SentencePiece makes, by
    their ids in the model's own vocabulary, and their characters.

    Args:
        tokenizer: transformers' M2M100Tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:  # of no other encoder
            import sentencepiece.sentencepiece_pb2 as messages
        except ImportError:
            lack = "M2M-100's tokenizer needs packages that are not here"
            raise ValueError(f"{lack}: pip install sentencepiece protobuf") from None
        self.model, self.ids = tokenizer.sp_model, tokenizer.encoder
        self.unknown = self.ids[tokenizer.unk_token]
        self._parse = messages.SentencePieceText.FromString  # type: ignore[attr-defined]

    def encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        assert not add_special_tokens
        pieces = self._parse(self.model.encode(text, out_type="serialized_proto")).pieces
        ids = [self.ids.get(piece.piece, self.unknown) for piece in pieces]
        # A character that becomes several pieces is the last one's alone there; here it is each's.
        offsets: list[Range] = []
        for piece in reversed(pieces):
            is_shared = piece.begin == piece.end and offsets and offsets[-1][0] == piece.begin
            offsets.append(offsets[-1] if is_shared else (piece.begin, piece.end))
        return Tokens(ids, _characters(text, offsets[::-1]))


@dataclass(frozen=True)
class Prefixed:
    """A tokenizer whose every text has a prefix, which is none of the text's characters: of a token
    that has some of both the offsets are the text's alone, and of others of the prefix empty.
    """

    backend: Tokenizer | SentencePieces
    prefix: str

    def encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        assert not add_special_tokens
        tokens = self.backend.encode(self.prefix + text, add_special_tokens=False)
        shift = len(self.prefix)
        offsets = [(max(0, a - shift), max(0, b - shift)) for a, b in tokens.offsets]
        return Tokens(tokens.ids, offsets)


def only_read(tokenizer: PreTrainedTokenizerFast) -> None:
    """Takes from a tokenizer what it would do beside making tokens of a text's characters."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _spell_control_tokens(tokenizer)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | SentencePieces:
    is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer.backend_tokenizer if is_fast else SentencePieces(tokenizer)


def around_of(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts around a text by itself, found by looking."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    places = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    start = next(places, None)
    if start is None:
        where = f"the tokenizer in {tokenizer.name_or_path}"
        raise ValueError(f"{where} makes other tokens of a text when it puts its own around it")
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def has_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its words are made of SentencePiece's unigrams."""
    is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    return is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def _characters(text: str, offsets: Sequence[Range]) -> Sequence[Range]:
    """Bytes of UTF-8 as characters."""
    content = np.frombuffer(text.encode(), np.uint8)
    if len(content) == len(text) or not offsets:
        return offsets
    is_first = (content & 0xC0) != 0x80
    before = np.concatenate([[0], np.cumsum(is_first)])
    return [(start, end) for start, end in before[np.array(offsets)].tolist()]


def _spell_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Takes control tokens that are spelled in a text apart behind their first character, where
    they stand among the pieces that words are made of: SentencePiece itself finds none in a text.
    """
    if not has_pieces(tokenizer):
        return
    backend = tokenizer.backend_tokenizer
    words = backend.get_vocab(with_added_tokens=False)
    added = (each.content for each in backend.get_added_tokens_decoder().values() if each.special)
    spelled = [token for token in added if token in words and len(token) > 1]
    if spelled:
        starts = "|".join(f"{re.escape(each[0])}(?={re.escape(each[1:])})" for each in spelled)
        apart = pre_tokenizers.Split(Regex(starts), "merged_with_previous")
        steps = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, apart])
