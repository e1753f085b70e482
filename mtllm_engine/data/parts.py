"""Texts in parts: the encoder reads lines, or sentences, one by one, and the LLM sees where they
end; and where a text may be cut.

An exported folder carries this file as it is, so it imports nothing of ours.
"""

import bisect
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

import regex
from tokenizers import Tokenizer

Range = tuple[int, int]  # characters [start, end) of a text

GRAPHEME = regex.compile(r"\X(?=.)", regex.DOTALL)  # not the last one looked at, which may go on
WORD_END = re.compile(r"(?<=\S)(?=\s)")
LONGEST_WORD = 1024  # characters looked at beyond what fits, for the next end of a word
NEWLINE = r"[\n\v\f\r\x85\u2028\u2029]"
BREAK = regex.compile(rf"{NEWLINE}(?:\s*{NEWLINE})?")
CASED = r"[\p{Lu}\p{Ll}--\p{Georgian}]"  # Georgian's one kind of letters is lower case to Unicode
QUOTE = r"\p{Pi}\p{Pf}\"'"
# Scripts' own full stops. Unicode counts a comma of Burmese (U+104A) among them, and leaves out
# what is typed for a danda in Bengali.
STOP = r"[[\p{Sentence_Terminal}৷༎]--[.!?\u2024\uFE52\uFF0E\u104A]]"
SHORT = "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|No|Nr|Gen|Col|Lt|Sgt|Capt|Rev|Fig|Vol|Mt|Gov|Sen|Rep|ca"
SENTENCE_END = regex.compile(
    rf"""
    (?:
        # Tibetan's shad is one unless it is a comma behind "and".
        (?<! {STOP} | ། ) (?: {STOP} | (?<! དང་ ) ། )++
        [{QUOTE}\p{{Pe}}]*+ \s*+
      |
        # A mark with other uses needs white space behind it, and then no word in lower case; but
        # what is abbreviated has not four letters.
        (?<! [.!?…] )
        (?:
            # Not behind an initial, ordinal or title; Armenian ends with a colon, Thai with none.
            (?<! \b (?: {CASED} | \p{{N}}{{1,2}} | {SHORT} ) | \p{{Armenian}} | \p{{Thai}} ) [.…]++
          | [!?…] [.!?…]*+
          | (?<= \p{{Armenian}} | [»)] ) :
          | (?<= \p{{Greek}} ) ;
        )
        (?: (?<= \p{{Ll}}{{4}} \. ) \s++ (?= \p{{Ll}} )
          | [{QUOTE}\p{{Pe}}]*+ \s++ (?! [{QUOTE}\p{{Ps}}]* [[\p{{Ll}}--\p{{Georgian}}],;:–—-] ) )
    )
    (?= [^\p{{L}}\p{{N}}]{{0,8}}+ [\p{{L}}\p{{N}}] )  # what has no word is no sentence
    """,
    regex.V1 | regex.VERBOSE,
)


class Backend(Protocol):
    """What makes tokens of a text, with `ids` and `offsets`: a `Tokenizer`, or what takes its
    place."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Parted:
    """What `PartsTokenizer` makes of a text; `ids` and `offsets` as those of an `Encoding`.

    Special tokens have the offsets [a, a), where their part starts or ends.
    """

    ids: list[int] = field(default_factory=list)
    offsets: list[Range] = field(default_factory=list)
    parts: list[Range] = field(default_factory=list)
    """Each part's tokens [start, end), special ones included."""

    def add(self, ids: Iterable[int], offsets: Iterable[Range]) -> None:
        self.ids.extend(ids)
        self.offsets.extend(offsets)


@dataclass(frozen=True, kw_only=True)
class PartsTokenizer:
    """The encoder's tokenizer for texts in parts: `prefix + tokens + suffix` of each part, between
    them the LLM's own tokens of the newlines there, and nothing between sentences.

    The latter are all tokens that the LLM makes of the whole text and that have a character of a
    run of newlines, each once and as it is: just what the teacher reads there. What one of them
    holds besides (as `.\\n` does) is in its part too; its offsets are the newlines' alone.
    """

    encoder: Backend
    llm: Tokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    kind: str
    """Of parts, as in `find_parts`."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Parted:
        """Like a `Tokenizer`'s; special tokens are those of the parts alone."""
        assert not add_special_tokens
        encoding = Parted()
        parts = [(span, None) for span in find_parts(text, self.kind)]
        between = self._between(text)
        for span, token in sorted([*parts, *between], key=itemgetter(0)):
            if token is None:
                self._add_part(encoding, text, span)
            else:
                encoding.add([token], [span])
        return encoding

    def _add_part(self, encoding: Parted, text: str, span: Range) -> None:
        (start, end), first = span, len(encoding.ids)
        tokens = self.encoder.encode(text[start:end], add_special_tokens=False)
        encoding.add(self.prefix, [(start, start)] * len(self.prefix))
        encoding.add(tokens.ids, [(start + a, start + b) for a, b in tokens.offsets])
        encoding.add(self.suffix, [(end, end)] * len(self.suffix))
        encoding.parts.append((first, len(encoding.ids)))

    def _between(self, text: str) -> Iterator[tuple[Range, int]]:
        """The newlines' characters that tokens of the LLM have, and these tokens."""
        breaks = deque(find_breaks(text))
        if not breaks:
            return
        tokens = self.llm.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(tokens.ids, tokens.offsets):
            while breaks and breaks[0][1] <= start:
                breaks.popleft()
            if breaks and breaks[0][0] < end:
                yield (max(start, breaks[0][0]), min(end, breaks[0][1])), token


def find_breaks(text: str) -> list[Range]:
    """The runs of newlines, from the first to the last of those with white space alone between."""
    return [match.span() for match in BREAK.finditer(text)]


def find_parts(text: str, kind: str) -> list[Range]:
    """The lines or sentences of a text, in order, without the white space around them; of a text of
    white space alone the empty one.

    Every other character is in exactly one part.

    Args:
        kind: "lines", or "sentences", which end with their lines at the latest.
    """
    parts = [
        (start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()))
        for start, end in _pieces(text, kind)
        if (piece := text[start:end]).strip()
    ]
    return parts or [(0, 0)]


def _pieces(text: str, kind: str) -> Iterator[Range]:
    start = 0
    for line_end, next_line in [*find_breaks(text), (len(text), len(text))]:
        if kind == "sentences":
            for match in SENTENCE_END.finditer(text, start, line_end):
                yield start, match.end()
                start = match.end()
        yield start, line_end
        start = next_line


def cuts(text: str, reach: int) -> Iterator[int]:
    """Where a text may be cut, best first: ends of words down from `reach`, then of graphemes.

    Cut at the end of a word, what is before has hardly other tokens than in the whole text; cut
    inside a word, its last characters merge anew, into fewer tokens at times. So one word and two
    graphemes beyond `reach` are tried too, and the first few candidates nearly always hold the
    largest that fits.
    """
    yield from (end for end in _ends(WORD_END, text, reach, beyond=1) if 2 * end >= reach)
    yield from _ends(GRAPHEME, text, reach, beyond=2)


def _ends(unit: re.Pattern, text: str, reach: int, *, beyond: int) -> list[int]:
    """Where units of a text end, from the last of `beyond` ones after `reach` down."""
    ends = [match.end() for match in unit.finditer(text, 0, reach + LONGEST_WORD)]
    return ends[: bisect.bisect_right(ends, reach) + beyond][::-1]
