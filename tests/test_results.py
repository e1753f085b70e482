"""Predictions in files and what they come to, against definitions written out in plain Python."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_engine import results, scores, tables
from mtllm_engine.results import Predictions
from mtllm_engine.tables import AVERAGE, KNOWN

WORDS = ["The", "a", "an", "Katze", "кот", "猫が", "don't", "cat,", "cat", "--", "THE"]


def build(
    system="mt-llm", language="swh_Latn", seed=42, *, n=60, right=0.7, classes=3, data=0, **fields
) -> Predictions:
    """Random predictions; equal `data` and language are equal labels."""
    labels = np.random.default_rng(data).integers(0, classes, n)
    draw = np.random.default_rng([data, seed, *system.encode(), *language.encode()])
    answers = np.where(draw.random(n) < right, labels, draw.integers(0, classes, n))
    options = {"dataset": "xnli", "metric": "accuracy", "num_classes": classes, "keys": [f"k{i}" for i in range(n)]}
    options |= {"system": system, "language": language, "seed": seed, "labels": labels, "predictions": answers}
    return Predictions(**options | fields)


@given(data=st.data(), num_classes=st.integers(1, 6), n=st.integers(1, 40))
def test_accuracy_and_macro_f1_are_their_definitions(data, num_classes, n):
    classes = st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n)
    labels, answers = data.draw(classes), data.draw(classes)
    f1 = []
    for c in range(num_classes):
        true = sum(label == answer == c for label, answer in zip(labels, answers))
        precision = true / answers.count(c) if c in answers else 0.0
        recall = true / labels.count(c) if c in labels else 0.0
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert scores.macro_f1(np.array(labels), np.array(answers), num_classes) == pytest.approx(sum(f1) / num_classes)
    item = replace(
        build(n=n), labels=np.array(labels), predictions=np.array(answers), num_classes=num_classes, metric="macro_f1"
    )
    by_measure = {table.measure: table for table in results.summarise([item], resamples=2)}
    assert by_measure["macro_f1"].scores["mt-llm"]["swh_Latn"].value == pytest.approx(sum(f1) / num_classes)
    right = sum(label == answer for label, answer in zip(labels, answers))
    assert by_measure["accuracy"].scores["mt-llm"]["swh_Latn"].value == pytest.approx(right / n)


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "f1"),
    [
        ("The cat.", ["cat"], 1, 1),
        ("an  Anna", ["anna"], 1, 1),
        ("a big cat", ["cat", "dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("", ["the"], 1, 0),  # nothing is left of either: no common word, as in SQuAD 1.1
        ("Категория А", ["категория а"], 1, 1),
        ("猫が好き", ["猫が"], 0, 0),
        ("theatre", ["atre"], 0, 0),
    ],
)
def test_squad_measures(prediction, answers, match, f1):
    assert scores.exact_match(prediction, answers) == match
    assert scores.token_f1(prediction, answers) == pytest.approx(f1)


@given(st.lists(st.sampled_from(WORDS), max_size=8), st.lists(st.sampled_from(WORDS), max_size=8))
def test_token_f1_counts_common_words(predicted, expected):
    def words(text):
        cleaned = ["".join(c for c in word.lower() if c not in "'-,") for word in text]
        return [word for word in cleaned if word and word not in ("a", "an", "the")]

    left, common = words(expected), 0
    for word in words(predicted):
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / max(1, len(words(predicted))), common / max(1, len(words(expected)))
    f1 = 2 * precision * recall / (precision + recall) if common else 0
    assert scores.token_f1(" ".join(predicted), [" ".join(expected)]) == pytest.approx(f1)


def test_bootstrap_is_that_of_drawn_examples():
    item, other = build(n=80), build("llm", n=80, right=0.5)
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 80, (4000, 80))
    columns = [x.predictions for x in (item, other)]
    for metric, measure in (
        ("accuracy", lambda labels, answers: np.mean(labels == answers)),
        ("macro_f1", lambda labels, answers: scores.macro_f1(labels, answers, 3)),
    ):
        pair = [replace(x, metric=metric) for x in (item, other)]
        brute = np.array([[measure(item.labels[i], answers[i]) for answers in columns] for i in drawn])
        table = results.summarise(pair, resamples=4000)[0]
        score = table.scores["mt-llm"]["swh_Latn"]
        assert (score.low, score.high) == pytest.approx(np.quantile(brute[:, 0], [0.025, 0.975]), abs=0.015)
        (score, *_) = results.compare(pair, "mt-llm", "llm", resamples=4000)[0].scores.values()
        expected = np.quantile(brute[:, 0] - brute[:, 1], [0.025, 0.975])
        assert (score.low, score.high) == pytest.approx(expected, abs=0.02)


def test_a_difference_is_paired():
    """Two systems that always err together differ by exactly what sets them apart, however much each is unsure."""
    ours = build(n=200, right=0.5)
    theirs = replace(ours, system="llm", seed=1)
    same = results.compare([ours, theirs], "mt-llm", "llm")[0].scores["swh_Latn"]
    assert (same.value, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    wrong = replace(theirs, predictions=np.where(np.arange(200) < 20, (theirs.labels + 1) % 3, theirs.predictions))
    score = results.compare([ours, wrong], "mt-llm", "llm")[0].scores["swh_Latn"]
    gained = np.mean((ours.predictions == ours.labels)[:20]) / 10
    assert score.value == pytest.approx(gained) and 0 < score.low < gained < score.high and score.excludes_zero


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_languages_with_the_same_examples_are_resampled_together(metric: str):
    """Four copies of a test set tell no more than one; four of other examples tell twice as much."""
    codes = ("deu_Latn", "fra_Latn", "nld_Latn", "swh_Latn")
    one = build(n=400, right=0.6, metric=metric)
    copies = [replace(one, language=code) for code in codes]
    (alone, *_), (together, *_) = results.summarise([one]), results.summarise(copies)
    score = together.scores["mt-llm"][AVERAGE]
    assert (score.low, score.high) == pytest.approx(
        (alone.scores["mt-llm"]["swh_Latn"].low, alone.scores["mt-llm"]["swh_Latn"].high)
    )
    others = [replace(item, keys=[f"{item.language}-{key}" for key in item.keys]) for item in copies]
    apart = results.summarise(others)[0].scores["mt-llm"][AVERAGE]
    assert 2 * (apart.high - apart.low) == pytest.approx(score.high - score.low, rel=0.2)


def test_intervals_do_not_depend_on_what_else_is_summarised():
    items = [build(metric="macro_f1"), build("llm", metric="macro_f1"), build(language="deu_Latn", metric="macro_f1")]
    alone = results.summarise(items[:1])[0].scores["mt-llm"]["swh_Latn"]
    random.Random(0).shuffle(items)
    assert results.summarise(items)[0].scores["mt-llm"]["swh_Latn"] == alone
    assert results.summarise(items, seed=1)[0].scores["mt-llm"]["swh_Latn"] != alone


def test_averages_are_over_languages_that_all_systems_have():
    statuses = {"deu_Latn": "known", "swh_Latn": "known", "nij_Latn": "fallback", "fra_Latn": "known"}
    items = [
        build(system, language, seed, language_status=status if system == "mt-llm" else None)
        for system in ("llm", "mt-llm")
        for language, status in statuses.items()
        for seed in (42, 43, 44)
        if (system, language) != ("llm", "fra_Latn")
    ]
    (table,) = results.summarise(items)
    assert table.languages == dict(sorted(statuses.items()))
    assert table.averaged == {AVERAGE: ["deu_Latn", "nij_Latn", "swh_Latn"], KNOWN: ["deu_Latn", "swh_Latn"]}
    for system in ("llm", "mt-llm"):
        for name, members in table.averaged.items():
            per_seed = [
                np.mean([np.mean(x.labels == x.predictions) for x in items if named(x, system, seed, members)])
                for seed in (42, 43, 44)
            ]
            score = table.scores[system][name]
            assert score.value == pytest.approx(np.mean(per_seed))
            assert score.sd == pytest.approx(np.std(per_seed, ddof=1))
            widths = [table.scores[system][x].high - table.scores[system][x].low for x in members]
            assert score.low < score.value < score.high and score.high - score.low < min(widths)


def named(item: Predictions, system: str, seed: int, languages) -> bool:
    return item.system == system and item.seed == seed and item.language in languages


def test_rows_are_matched_by_key_not_by_place():
    item, other = build(), build("llm")
    order = np.random.default_rng(0).permutation(60)
    keys = [other.keys[i] for i in order]
    shuffled = replace(other, keys=keys, labels=other.labels[order], predictions=other.predictions[order])
    expected = results.compare([item, other], "mt-llm", "llm")
    assert results.compare([item, shuffled], "mt-llm", "llm") == expected


@settings(max_examples=15)
@given(n=st.integers(1, 9), text=st.booleans(), data=st.integers(0, 1000))
def test_what_is_saved_is_loaded(tmp_path_factory, n, text, data):
    folder = tmp_path_factory.mktemp("saved")
    item = build(n=n, data=data, language_status="known", latency_s=1.5, flops=1e20)
    if text:
        answers = [[f"«{i}»\u2028", "b"] for i in range(n)]
        item = replace(item, metric="exact_match_f1", labels=answers, predictions=[f"b\n{i}" for i in range(n)])
    path = results.save(folder, item)
    assert path == folder / "xnli" / "mt-llm" / "predictions-swh_Latn-42.jsonl"
    (loaded,) = results.load(folder)
    for name, value in vars(item).items():
        assert np.array_equal(getattr(loaded, name), value), name
    assert [table.measure for table in results.summarise([loaded], resamples=2)] == list(results.MEASURES[item.metric])


def test_what_does_not_fit_together_is_refused(tmp_path):
    first = results.save(tmp_path, build())
    second = first.with_name("predictions-copy.jsonl")
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        ValueError, match=r"predictions-copy.jsonl and .*42.jsonl both hold mt-llm / xnli / swh_Latn / 42"
    ):
        results.load(tmp_path)
    with pytest.raises(ValueError, match="comes twice with the same seed"):
        results.summarise([build(), build()])
    other = build("llm", keys=[f"k{i + 1}" for i in range(60)])
    with pytest.raises(
        ValueError, match=r"mt-llm / xnli / swh_Latn and llm / .* different examples: only one has 'k0'"
    ):
        results.compare([build(), other], "mt-llm", "llm")
    with pytest.raises(ValueError, match="different labels for 'k"):
        results.compare([build(), build("llm", data=1)], "mt-llm", "llm")
    with pytest.raises(ValueError, match="seed 43 were asked different examples"):
        results.summarise([build(), replace(other, system="mt-llm", seed=43)])
    with pytest.raises(ValueError, match="no predictions of system 'lm'; there are llm, mt-llm"):
        results.compare([build(), build("llm")], "mt-llm", "lm")
    with pytest.raises(ValueError, match="'xnli' has predictions of different tasks"):
        results.summarise([build(), build("llm", metric="macro_f1")])
    with pytest.raises(ValueError, match="no predictions-"):
        results.load(tmp_path / "xnli" / "nothing")


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
        ({"keys": [], "labels": [], "predictions": [], "language_status": "known"}, "0 keys, 0 labels, 0 predictions"),
        ({"system": "a/b"}, "'a/b' is no name"),
        ({"metric": "f1"}, "metric 'f1' is none of accuracy"),
        ({"language_status": "no"}, "language_status 'no' is none of known"),
    ],
)
def test_predictions_that_make_no_sense_are_refused(fields, message):
    columns = {"keys": ["a", "b"], "labels": np.array([0, 1]), "predictions": np.array([0, 1])}
    with pytest.raises(ValueError, match=message):
        build(**columns | fields)


@pytest.mark.parametrize("damage", [lambda t: t[: len(t) // 2], lambda t: t.replace("rows", "row", 1), lambda t: "x\n"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = results.save(tmp_path, build())
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"predictions-swh_Latn-42.jsonl, line \d+: damaged .*; evaluate again"):
        results.load(tmp_path)


@given(st.integers(1, 300))
def test_a_picture_shows_every_row_once(num_rows):
    rows = [str(index) for index in range(num_rows)]
    panels = tables._panels(rows)
    assert [row for panel in panels for row in panel] == rows
    assert all(0 < len(panel) <= len(panels[0]) <= tables.PANEL_ROWS for panel in panels)


def test_the_table_is_written_as_csv_json_markdown_and_picture(tmp_path: Path):
    known = {"language_status": "known", "language_given": "deu_Latn"}
    for system, language in [("llm", "deu_Latn"), ("mt-llm", "deu_Latn"), ("mt-llm", "nij_Latn")]:
        encoded = {"language_status": "fallback", "language_given": "ind_Latn"} if language == "nij_Latn" else known
        for seed in (42, 43):
            results.save(tmp_path, build(system, language, seed, latency_s=2.0, **encoded))
    results.save(tmp_path, build("mt-llm", "bbc_Latn", n=0, language_status="unknown"))
    path = results.write(tmp_path, baseline="llm", resamples=200)
    (table,) = results.summarise(results.load(tmp_path), resamples=200)
    score = table.scores["mt-llm"]["nij_Latn"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["language"] for row in rows] == ["bbc_Latn", "deu_Latn", "nij_Latn", AVERAGE, KNOWN]
    told = [(row["status"], row["given"]) for row in rows]
    assert told == [("unknown", ""), ("known", "deu_Latn"), ("fallback", "ind_Latn"), ("", ""), ("", "")]
    assert rows[2]["llm"] == rows[0]["mt-llm"] == "" and rows[3]["languages"] == "1"
    assert [float(rows[2][f"mt-llm{kind}"]) for kind in ("", " low", " high", " sd")] == pytest.approx(
        [score.value, score.low, score.high, score.sd], abs=1e-6
    )
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["tables"][0]["scores"]["mt-llm"]["nij_Latn"]["low"] == score.low
    (comparison,) = stored["comparisons"]
    assert comparison["scores"].keys() == {"deu_Latn", AVERAGE, KNOWN}
    differing = [name for name, score in comparison["scores"].items() if not score["low"] <= 0 <= score["high"]]
    assert comparison["excludes_zero"] == differing
    text = path.read_text()
    cell = f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}] ± {100 * score.sd:.1f}"
    assert f"| nij_Latn* | - | {cell} |" in text and "| s for 1,000 examples | 2 | 2 |" in text
    assert "| bbc_Latn† | - | - |" in text and "\n\n† bbc_Latn was not given to an encoder, which has" in text
    assert "\n\n* nij_Latn was given to the encoder as ind_Latn\n" in text and "* deu_Latn" not in text
    assert (tmp_path / "results-xnli-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(".*"))
