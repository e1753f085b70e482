"""Predictions in files: what is saved is loaded, and what makes no sense is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_engine.evaluation.bootstrap import summarise
from mtllm_engine.evaluation.metrics import MEASURES
from mtllm_engine.evaluation.predictions import load, save
from mtllm_engine.evaluation.tables import write
from tests.support.predictions import build


@settings(max_examples=15)
@given(n=st.integers(1, 9), text=st.booleans(), data=st.integers(0, 1000))
def test_what_is_saved_is_loaded(tmp_path_factory, n, text, data):
    folder = tmp_path_factory.mktemp("saved")
    item = build(n=n, data=data, language_status="known", latency_s=1.5, flops=1e20)
    if text:
        answers = [[f"«{i}»\u2028", "b"] for i in range(n)]
        columns = {"labels": answers, "predictions": [f"b\n{i}" for i in range(n)]}
        item = replace(item, metric="exact_match_f1", **columns)
    path = save(folder, item)
    assert path == folder / "xnli" / "mt-llm" / "predictions-swh_Latn-42.jsonl"
    (loaded,) = load(folder)
    for name, value in vars(item).items():
        assert np.array_equal(getattr(loaded, name), value), name
    measures = [table.measure for table in summarise([loaded], resamples=2)]
    assert measures == list(MEASURES[item.metric])


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    first = save(tmp_path, build())
    second = first.with_name("predictions-copy.jsonl")
    second.write_bytes(first.read_bytes())
    message = r"predictions-copy.jsonl and .*42.jsonl both hold mt-llm / xnli / swh_Latn / 42"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    with pytest.raises(ValueError, match="no predictions-"):
        load(tmp_path / "xnli" / "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"predictions": np.array([0, 3])},
            "mt-llm / xnli / swh_Latn / 42: predictions has 3 for key 'b', not a class",
        ),
        ({"labels": np.array([-1, 0])}, "labels has -1 for key 'a', not a class from 0 to 2"),
        ({"labels": np.array([0.5, 0])}, "labels has 0.5"),
        ({"keys": ["a", "a"]}, "key 'a' comes twice"),
        ({"keys": ["a"]}, "1 keys, 2 labels, 2 predictions"),
        (
            {"keys": [], "labels": [], "predictions": [], "language_status": "known"},
            "0 keys, 0 labels, 0 predictions",
        ),
        ({"system": "a/b"}, "'a/b' is no name"),
        ({"metric": "f1"}, "metric 'f1' is none of accuracy"),
        ({"language_status": "no"}, "language_status 'no' is none of known"),
    ],
)
def test_predictions_that_make_no_sense_are_refused(fields, message):
    columns = {"keys": ["a", "b"], "labels": np.array([0, 1]), "predictions": np.array([0, 1])}
    with pytest.raises(ValueError, match=message):
        build(**columns | fields)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda t: "", ", line 1"),
        (lambda t: t.replace("rows", "row", 1), ", line 1"),
        (lambda t: "x\n", ", line 1"),
        (lambda t: "".join(t.splitlines(keepends=True)[:3])[:-9], ", line 3"),
        (lambda t: t.replace('"k1"', '"k1', 1), ", line 3"),
        (lambda t: t.replace('"key": "k1"', '"kex": "k1"', 1), ", line 3"),
        (lambda t: t + '{"key": "new"}\n', ", line 62"),
        (lambda t: t.replace('"k1"', '"k_1"', 1), ""),  # by its digest, which knows no line
    ],
)
def test_a_damaged_file_is_refused_by_its_line_or_left_out(tmp_path, damage, where):
    path = save(tmp_path, build())
    path.write_text(damage(path.read_text()))
    message = rf"predictions-swh_Latn-42.jsonl{where}: damaged .*; evaluate again, or remove it"
    for damaged in (None, []):  # nothing else is there
        with pytest.raises(ValueError, match=message):
            load(tmp_path, damaged)
    save(tmp_path, build(language="deu_Latn"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    damaged = []
    assert [each.language for each in load(tmp_path, damaged)] == ["deu_Latn"]
    assert len(damaged) == 1 and damaged[0].startswith(f"{path}{where}: damaged ")


def test_tables_name_what_is_damaged_and_do_without(tmp_path):
    path = save(tmp_path, build())
    save(tmp_path, build(language="deu_Latn"))
    path.write_text("x\n")
    text = write(tmp_path, resamples=2).read_text()
    assert f"Left out: {path}, line 1: damaged" in text and "deu_Latn" in text
    (line,) = json.loads((tmp_path / "results.json").read_text())["damaged"]
    assert line.startswith(str(path)) and "swh_Latn" not in (tmp_path / "results.csv").read_text()
