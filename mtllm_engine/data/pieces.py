"""What takes a `Tokenizer`'s place for an encoder whose texts are not simply handed to one.

An exported folder carries this file as it is, so it imports nothing of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

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
        import sentencepiece.sentencepiece_pb2 as messages  # of no other encoder

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


def _characters(text: str, offsets: Sequence[Range]) -> Sequence[Range]:
    """Bytes of UTF-8 as characters."""
    content = np.frombuffer(text.encode(), np.uint8)
    if len(content) == len(text) or not offsets:
        return offsets
    is_first = (content & 0xC0) != 0x80
    before = np.concatenate([[0], np.cumsum(is_first)])
    return [(start, end) for start, end in before[np.array(offsets)].tolist()]
