"""Tables, written in every form."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.evaluation.bootstrap import AVERAGE, KNOWN, summarise
from mtllm_engine.evaluation.predictions import TRANSLATION_COUNTS, load, save
from mtllm_engine.evaluation.tables import PANEL_ROWS, _panels, write
from tests.support.predictions import build


@given(st.integers(1, 300))
def test_a_picture_shows_every_row_once(num_rows):
    rows = [str(index) for index in range(num_rows)]
    panels = _panels(rows)
    assert [row for panel in panels for row in panel] == rows
    assert all(0 < len(panel) <= len(panels[0]) <= PANEL_ROWS for panel in panels)


def test_the_table_is_written_as_csv_json_markdown_and_picture(tmp_path: Path):
    known = {"language_status": "known", "language_given": "deu_Latn"}
    fallback = {"language_status": "fallback", "language_given": "ind_Latn"}
    for seed in (42, 43):
        save(tmp_path, build("llm", "deu_Latn", seed, latency_s=2.0, **known))
        save(tmp_path, build("mt-llm", "deu_Latn", seed, latency_s=2.0, **known))
        save(tmp_path, build("mt-llm", "nij_Latn", seed, latency_s=2.0, **fallback))
    save(tmp_path, build("mt-llm", "bbc_Latn", n=0, language_status="unknown"))
    path = write(tmp_path, baseline="llm", resamples=200)
    (table,) = summarise(load(tmp_path), resamples=200)
    score = table.scores["mt-llm"]["nij_Latn"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["language"] for row in rows] == ["bbc_Latn", "deu_Latn", "nij_Latn", AVERAGE, KNOWN]
    encoded = [("unknown", ""), ("known", "deu_Latn"), ("fallback", "ind_Latn"), ("", ""), ("", "")]
    assert [(row["status"], row["given"]) for row in rows] == encoded
    assert rows[2]["llm"] == rows[0]["mt-llm"] == "" and rows[3]["languages"] == "1"
    written = [float(rows[2][f"mt-llm{kind}"]) for kind in ("", " low", " high", " sd")]
    values = [score.value, score.low, score.high, score.sd]
    assert written == pytest.approx(values, abs=1e-6)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["tables"][0]["scores"]["mt-llm"]["nij_Latn"]["low"] == score.low
    (comparison,) = stored["comparisons"]
    assert comparison["scores"].keys() == {"deu_Latn", AVERAGE, KNOWN}
    scores = comparison["scores"].items()
    differing = [name for name, each in scores if not each["low"] <= 0 <= each["high"]]
    assert comparison["excludes_zero"] == differing
    text = path.read_text()
    value, low, high, sd = (f"{100 * each:.1f}" for each in values)
    cell = f"{value} [{low}, {high}] ± {sd}"
    assert f"| nij_Latn* | - | {cell} |" in text and "| s for 1,000 examples | 2 | 2 |" in text
    assert "| bbc_Latn† | - | - |" in text and "* deu_Latn" not in text
    assert "\n\n† bbc_Latn was not given to an encoder, which has" in text
    assert "\n\n* nij_Latn was given to the encoder as ind_Latn\n" in text
    assert (tmp_path / "results-xnli-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("by", "told"),
    [("sentences", "sentence by sentence\n"), ("lines", "line by line, where a"), (None, None)],
)
def test_a_table_says_what_was_translated_at_a_time(tmp_path: Path, by: str | None, told: str):
    about = {"checkpoint": "c", "test": "t", "commit": "c", "evaluated": "1"}
    settings = {"evaluate.translate_by": by} if by else {}
    counts = dict.fromkeys(TRANSLATION_COUNTS, 0)
    maker = about | {"settings": settings}
    for language, fields in (("deu_Latn", counts), ("eng_Latn", {})):
        save(tmp_path, build("translate_test", language, n=4, maker=maker, **fields))
    save(tmp_path, build("llm", "deu_Latn", n=4, maker=about | {"settings": {}}))
    text = write(tmp_path, resamples=5).read_text()
    assert text.count("translate_test: translated ") == (by is not None)
    assert by is None or f"translate_test: translated {told}" in text
    (table,) = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert table["translated_by"] == ({"translate_test": by} if by else {})
