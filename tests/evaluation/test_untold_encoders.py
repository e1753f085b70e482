"""Encoders that are not told the language: every test set is read, and what they were not trained
on is marked.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mtllm_engine.config import Config
from mtllm_engine.evaluation.bootstrap import KNOWN, summarise
from mtllm_engine.evaluation.systems import build_translator, find_tests, predict
from mtllm_engine.evaluation.tables import markdown
from tests.support import predictions
from tests.support.encoders import build_padded_encoder
from tests.support.stages import ALONE
from tests.support.tiny import build_config, build_decoder, build_encoder

CODES = ("eng_Latn", "swh_Latn", "ibo_Latn", "nqo_Nkoo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_padded_encoder(folder / "encoder", "e5-small")
    build_encoder(folder / "nllb")
    build_decoder(folder / "decoder")
    for code in CODES:
        path = folder / "topics" / code / "test.tsv"
        path.parent.mkdir(parents=True)
        path.write_text("index_id\tcategory\ttext\n1\ttravel\ta\n")
    return folder


def configured(folder: Path, **evaluate) -> Config:
    task = {"name": "sib200", "test": [f"sib200:{folder}/topics"]}
    return build_config(folder, task=task, evaluate=evaluate, data={"train": []})


def test_each_encoder_says_what_it_knows(folder):
    config = configured(folder, systems=["llm", "translate_test"], translator=str(folder / "nllb"))
    tests = {test.language: test for test in find_tests(config)[1]}
    assert {code: test.resolved for code, test in tests.items()} == {
        "eng_Latn": ("eng_Latn", "known"),
        "swh_Latn": ("swh_Latn", "known"),
        "ibo_Latn": ("ibo_Latn", "unknown"),
        "nqo_Nkoo": ("nqo_Nkoo", "unknown"),
    }
    translated = {code: test.translated for code, test in tests.items()}
    assert translated.pop("nqo_Nkoo") == (None, "unknown")
    assert translated == {code: (code, "known") for code in CODES if code != "nqo_Nkoo"}


def test_what_the_translator_lacks_is_not_asked_of_it(folder):
    systems = {"systems": ["llm", "translate_test"], "translator": str(folder / "nllb")}
    config = configured(folder, **systems)
    task, tests = find_tests(config)
    (test,) = (each for each in tests if each.language == "nqo_Nkoo")
    reader = SimpleNamespace(kind="llm")
    said = predict(config, ALONE, task, reader, build_translator(config, ALONE), test)
    assert (said.language_status, said.language_given, len(said.keys)) == ("unknown", None, 0)


def test_it_is_no_translator(folder):
    with pytest.raises(ValueError, match="no tokens as NLLB's; set evaluate.translator to an NLLB"):
        find_tests(configured(folder, systems=["llm", "translate_test"]))


def test_what_it_was_not_trained_on_is_marked_and_read():
    known, unknown = (
        predictions.build("stack", code, language_status=status, language_given=code)
        for code, status in (("swh_Latn", "known"), ("ibo_Latn", "unknown"))
    )
    tables = summarise([known, unknown], resamples=20)
    text = markdown(tables, [], 20)
    assert "| ibo_Latn† | 7" in text or "| ibo_Latn† | 6" in text
    assert "† ibo_Latn was read by an encoder that was not trained on it" in text
    assert tables[0].averaged[KNOWN] == ["swh_Latn"]
