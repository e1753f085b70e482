"""How an encoder is told which language a text is in: by a token of its own, or not at all."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mtllm_engine.languages import (
    FLORES_200,
    OTHER_CODES,
    check_code,
    is_well_formed,
    nearest,
    nllb_token,
)

# What encoders' makers call languages beside ISO 639-1, and those that FLORES-200 lacks.
_THEIRS = """
    br bre_Latn co cos_Latn ff fuv_Latn fil tgl_Latn fy fry_Latn haw haw_Latn hmn hmn_Latn
    iw heb_Hebr ku kmr_Latn la lat_Latn ns nso_Latn
"""
THEIRS = dict(zip(_THEIRS.split()[::2], _THEIRS.split()[1::2], strict=True))
_FORMS = (  # of tokens: M2M-100's, and mBART's of a language in a country
    re.compile(r"__([a-z]{2,3})__"),
    re.compile(r"([a-z]{2})_[A-Z]{2}"),
)

# XLM-R's and multilingual E5's. Source: CC-100, arXiv 1911.02116, table 6.
_CC_100 = """
    af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he hi
    hr hu hy id is it ja jv ka kk km kn ko ku ky la lo lt lv mg mk ml mn mr ms my ne nl no om or pa
    pl ps pt ro ru sa sd si sk sl so sq sr su sv sw ta te th tl tr ug uk ur uz vi xh yi zh
    zho_Hant ben_Latn hin_Latn tam_Latn tel_Latn urd_Latn
"""
# Source: arXiv 2007.01852, appendix; 109 languages.
_LABSE = """
    af am ar as az be bg bn bo bs ca ceb co cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha
    haw he hi hmn hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn
    mr ms mt my ne nl no ny or pa pl pt ro ru rw si sk sl sm sn so sq sr st su sv sw ta te tg th tk
    tl tr tt ug uk ur uz vi wo xh yi yo zh zu
"""
# mT5's and, but for some more of its own, umT5's. Source: arXiv 2010.11934, table 6.
_MC4 = """
    af am ar az be bg bn ca ceb co cs cy da de el en eo es et eu fa fi fil fr fy ga gd gl gu ha haw
    hi hmn ht hu hy id ig is it iw ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt
    my ne nl no ny pa pl ps pt ro ru sd si sk sl sm sn so sq sr st su sv sw ta te tg th tr uk ur uz
    vi xh yi yo zh zu bul_Latn ell_Latn hin_Latn jpn_Latn rus_Latn zho_Latn
"""


def _codes(theirs: str) -> frozenset[str]:
    return frozenset(code for name in theirs.split() if (code := _code(name)))


def _code(theirs: str) -> str | None:
    """Our code for a language as an encoder's makers call it; None: it is no language."""
    if is_well_formed(theirs):
        return theirs
    same = [code for code in FLORES_200 if code.startswith(f"{theirs}_")]
    return THEIRS.get(theirs) or OTHER_CODES.get(theirs) or (same[0] if len(same) == 1 else None)


TRAINED = {"xlm-roberta": _CC_100, "xlm-roberta-xl": _CC_100, "bert": _LABSE}
TRAINED |= {"mt5": _MC4, "umt5": _MC4}
"""Encoders that are not told the language, by model_type -> what they were trained on. Of T5's own
model_type are MADLAD-400's, of whose 419 languages there is no table here.
"""


class Resolved(NamedTuple):
    """What an encoder is given for a text's language: itself, a declared other one, or none. One
    that takes no token is given every language, known or not."""

    given: str | None
    status: Literal["known", "fallback", "unknown"]


@dataclass(frozen=True, kw_only=True)
class EncoderLanguages:
    """The languages of one encoder, by FLORES-200's codes and others of that form."""

    is_told: bool
    """Whether it takes a token that says which language a text is in."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Code -> that token."""
    is_last: bool = False
    """Whether the token stands behind the end of the text, not before the text."""
    trained: frozenset[str] | None = None
    """What one without tokens was trained on; None: nobody says, and every language counts."""

    @property
    def codes(self) -> frozenset[str]:
        """The languages that it knows."""
        if self.is_told:
            return frozenset(self.tokens)
        return frozenset(FLORES_200) if self.trained is None else self.trained

    def knows(self, code: str) -> bool:
        return code in self.codes or (not self.is_told and self.trained is None)

    def resolve(self, code: str, fallback: Mapping[str, str]) -> Resolved:
        """What the encoder is given for a text: never a token that it lacks.

        Args:
            fallback: `languages.fallback`; a language that the encoder can be given keeps that.

        Raises:
            ValueError: The declared fallback is a language that the encoder lacks too, or the code
                is no language's.
        """
        if not self.is_told:
            return Resolved(_checked(code), "known" if self.knows(code) else "unknown")
        if code in self.tokens:
            return Resolved(code, "known")
        if code not in fallback:
            return Resolved(None, "unknown")
        if fallback[code] not in self.tokens:
            lack = "the encoder has no token for that either"
            raise ValueError(f"languages.fallback.{code}={fallback[code]}: {lack}")
        return Resolved(fallback[code], "fallback")

    def readable(self, fallback: Mapping[str, str]) -> tuple[str, ...]:
        """The codes that texts may have; of an encoder that is told nothing, which reads any, those
        that it knows. Args: fallback: As for `resolve`."""
        return tuple(sorted({*self.codes, *(fallback if self.is_told else ())}))

    def token_of(self, code: str) -> str | None:
        """What the encoder is told; None of one that is told nothing.

        Raises:
            ValueError: It has no token for the language, or this is no language's code.
        """
        if code in self.tokens:
            return self.tokens[code]
        if not self.is_told:
            _checked(code)
            return None
        near = ", ".join(nearest(check_code(code), sorted(self.codes))) or "none"
        lack = f"the encoder's tokenizer has no token for the language {code}"
        raise ValueError(f"{lack}; the nearest that it has: {near}")


def _checked(code: str) -> str:
    """Returns the code of a text that is read whatever its language.

    Raises:
        ValueError: It has not a code's form.
    """
    return code if is_well_formed(code) else check_code(code)


def find_languages(
    added: Collection[str], *, model_type: str, has_pieces: bool
) -> EncoderLanguages:
    """The languages of an encoder.

    Args:
        added: The tokens that its tokenizer has beside those that words are made of.
        model_type: Its own, by Hugging Face; "": not known.
        has_pieces: Whether its words are made of SentencePiece's pieces.
    """
    flores = {nllb_token(code): code for code in FLORES_200}
    if own := {flores.get(token, token): token for token in added if is_well_formed(token)}:
        return EncoderLanguages(is_told=True, tokens=own)
    for form in _FORMS:
        matches = filter(None, map(form.fullmatch, added))
        if theirs := {code: m[0] for m in matches if (code := _code(m[1]))}:
            # mBART's first 25 languages came behind the text, with the 25 later ones before it.
            is_last = "ar_AR" in theirs.values() and "sw_KE" not in theirs.values()
            return EncoderLanguages(is_told=True, tokens=theirs, is_last=is_last)
    if model_type == "bert" and has_pieces:  # multilingual-e5-small's layers, on XLM-R's vocabulary
        model_type = "xlm-roberta"
    if model_type in TRAINED:
        return EncoderLanguages(is_told=False, trained=_codes(TRAINED[model_type]))
    return EncoderLanguages(is_told=model_type != "t5")
