"""What a translator cut or never ended is counted by example and by segment; a text's control
tokens are text."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.evaluation.bootstrap import summarise
from mtllm_engine.evaluation.predictions import TRANSLATION_COUNTS, load, save
from mtllm_engine.evaluation.tables import csv_text, markdown
from mtllm_engine.evaluation.translate import Translations, Translator, translate_examples
from mtllm_engine.tasks import Example
from tests.support.predictions import build
from tests.support.tiny import build_encoder, build_world

# `1999!` has no letter, and so is no segment.
SENTENCES = ("Zzaz zz.", "Zzbz zz!", "Zaaabb?", "Zzzz zz.", "1999!")
LINES = st.lists(st.sampled_from(SENTENCES), max_size=3)
CLEAN = dict.fromkeys(TRANSLATION_COUNTS, 0) | {"segments": 9}
FLAWED = dict(zip(TRANSLATION_COUNTS, (2, 1, 9, 4, 1)))


class Echo:
    """Stands for the translator: what has an `a` was cut, what has a `b` never ended."""

    def __call__(self, texts: Sequence[str], *, source: str, target: str) -> Translations:
        flawed = {
            name: frozenset(text for text in texts if letter in text)
            for name, letter in (("cut_texts", "a"), ("unfinished_texts", "b"))
        }
        counts = dict.fromkeys(("translated", "cached", "cut", "unfinished", "tokens"), 0)
        return Translations(texts=tuple(texts), wall_s=1.0, **counts, **flawed)


@given(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5), st.booleans())
def test_examples_are_counted_once_and_segments_each_time(
    passages: list[list[list[str]]], by_line: bool
):
    texts = ["\n".join(map(" ".join, lines)) for lines in passages]
    examples = [Example(key=str(number), text=text) for number, text in enumerate(texts)]
    options = {"source": "swh_Latn", "by": "lines" if by_line else "sentences"}
    translated = translate_examples(examples, Echo(), **options)
    assert translated.examples == examples and translated.wall_s == 1.0
    lines = [line for passage in passages for line in passage]
    segments = [" ".join(line) for line in lines] if by_line else itertools.chain(*lines)
    segments = [segment for segment in segments if "z" in segment.lower()]
    assert translated.counts == {
        "segments": len(segments),
        "cut": sum("a" in text for text in texts),
        "cut_segments": sum("a" in segment for segment in segments),
        "unfinished": sum("b" in text for text in texts),
        "unfinished_segments": sum("b" in segment for segment in segments),
    }


def test_a_table_has_the_counts_of_every_language_that_was_translated():
    items = [
        build("translate_test", "swh_Latn", 1, n=4, **FLAWED),
        build("translate_test", "swh_Latn", 2, n=4, **FLAWED),
        build("translate_test", "deu_Latn", 1, n=4, **CLEAN),
        build("translate_test", "eng_Latn", 1, n=4),
        build("llm", "swh_Latn", 1, n=4),
    ]
    tables = summarise(items, resamples=2)
    counts = {"swh_Latn": {"examples": 4} | FLAWED, "deu_Latn": {"examples": 4} | CLEAN}
    assert tables[0].translated == {"translate_test": counts}
    told = "translate_test in swh_Latn: of 9 segments 4 cut at the translator's positions, 1 "
    told += "translated without an end; they are in 2 and 1 of 4 examples\n"
    text = markdown(tables, [], 2)
    assert told in text and "in deu_Latn: of" not in text and "to an end" not in text
    header, *rows = (line.split(",") for line in csv_text(tables).splitlines())
    assert header[-5:] == [f"translate_test {name}" for name in TRANSLATION_COUNTS]
    ends = {row[2]: row[-5:] for row in rows[:3]}
    assert ends == {
        "swh_Latn": ["2", "1", "9", "4", "1"],
        "deu_Latn": ["0", "0", "9", "0", "0"],
        "eng_Latn": [""] * 5,
    }
    whole = markdown(summarise(items[2:], resamples=2), [], 2)
    assert "translate_test: every text was translated whole, to an end" in whole


def test_predictions_of_before_segments_were_counted_have_their_examples(tmp_path: Path):
    path = save(tmp_path, build("translate_test", "swh_Latn", n=4, cut=2, unfinished=0))
    first, rest = path.read_text().split("\n", 1)
    header = {name: value for name, value in json.loads(first).items() if "segments" not in name}
    path.write_text(json.dumps(header | {"sha256": None}) + "\n" + rest)
    tables = summarise(load(tmp_path), resamples=2)
    counts = {"examples": 4, "cut": 2, "unfinished": 0}
    assert tables[0].translated == {"translate_test": {"swh_Latn": counts}}
    told = "in swh_Latn: of 4 examples 2 cut at the translator's positions, 0 translated without"
    assert told in markdown(tables, [], 2)
    assert csv_text(tables).splitlines()[1].endswith(",2,0,,,")


@pytest.mark.parametrize(
    ("unknown", "known"),
    [("cut", ()), ("unfinished", ()), ("cut_segments", TRANSLATION_COUNTS[:2])],
)
def test_counts_that_are_not_all_known_are_not_told(unknown: str, known: tuple[str, ...]):
    item = build("translate_test", n=4, **FLAWED | {unknown: None})
    expected = {"examples": 4} | {name: FLAWED[name] for name in known} if known else {}
    assert item.translation_counts == expected
    told = "of 4 examples 2 cut" in markdown(summarise([item], resamples=2), [], 2)
    assert told == bool(known)


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> Translator:
    folder = build_encoder(tmp_path_factory.mktemp("translator"))
    return Translator(folder, cache=folder / "cache", world=build_world())


@given(data=st.data())
def test_a_text_that_spells_control_tokens_is_characters(translator: Translator, data):
    tokenizer = translator._tokenizer
    special = tokenizer.all_special_tokens + ["swh_Latn", "eng_Latn"]
    words = data.draw(st.lists(st.sampled_from([*special, "or", "and"]), min_size=1, max_size=5))
    (ids,) = translator._encode([" ".join(words)], "swh_Latn")
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    control |= set(tokenizer.convert_tokens_to_ids(["swh_Latn", "eng_Latn"]))
    assert ids[0] == tokenizer.convert_tokens_to_ids("swh_Latn")
    assert ids[-1] == tokenizer.eos_token_id and not control & set(ids[1:-1])


def test_what_is_read_from_the_cache_has_its_counts(translator: Translator, tmp_path: Path):
    made = Translator(translator.folder, cache=tmp_path, world=build_world())
    texts = ["or and", "and"]
    first, second = (made(texts, source="swh_Latn") for _ in range(2))
    assert (second.translated, second.cached) == (0, 2)
    for name in ("cut_texts", "unfinished_texts"):
        assert getattr(first, name) == getattr(second, name)
    assert (len(first.cut_texts), len(first.unfinished_texts)) == (first.cut, first.unfinished)
