"""Values, intervals and differences, against what drawing examples comes to."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mtllm_engine.evaluation.bootstrap import AVERAGE, KNOWN, compare, summarise
from mtllm_engine.evaluation.metrics import macro_f1
from mtllm_engine.evaluation.predictions import Predictions
from tests.support.predictions import build


def test_bootstrap_is_that_of_drawn_examples():
    item, other = build(n=80), build("llm", n=80, right=0.5)
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 80, (4000, 80))
    columns = [x.predictions for x in (item, other)]
    for metric, measure in (
        ("accuracy", lambda labels, answers: np.mean(labels == answers)),
        ("macro_f1", lambda labels, answers: macro_f1(labels, answers, 3)),
    ):
        pair = [replace(x, metric=metric) for x in (item, other)]
        brute = [[measure(item.labels[i], answers[i]) for answers in columns] for i in drawn]
        brute = np.array(brute)
        table = summarise(pair, resamples=4000)[0]
        score = table.scores["mt-llm"]["swh_Latn"]
        expected = np.quantile(brute[:, 0], [0.025, 0.975])
        assert (score.low, score.high) == pytest.approx(expected, abs=0.015)
        (score, *_) = compare(pair, "mt-llm", "llm", resamples=4000)[0].scores.values()
        expected = np.quantile(brute[:, 0] - brute[:, 1], [0.025, 0.975])
        assert (score.low, score.high) == pytest.approx(expected, abs=0.02)


def test_a_difference_is_paired():
    """Two systems that err together differ by exactly what sets them apart, however unsure each
    is."""
    ours = build(n=200, right=0.5)
    theirs = replace(ours, system="llm", seed=1)
    same = compare([ours, theirs], "mt-llm", "llm")[0].scores["swh_Latn"]
    assert (same.value, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    answers = np.where(np.arange(200) < 20, (theirs.labels + 1) % 3, theirs.predictions)
    wrong = replace(theirs, predictions=answers)
    score = compare([ours, wrong], "mt-llm", "llm")[0].scores["swh_Latn"]
    gained = np.mean((ours.predictions == ours.labels)[:20]) / 10
    assert score.value == pytest.approx(gained)
    assert 0 < score.low < gained < score.high and score.excludes_zero


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_languages_with_the_same_examples_are_resampled_together(metric: str):
    """Four copies of a test set tell no more than one; four of other examples tell twice as
    much."""
    codes = ("deu_Latn", "fra_Latn", "nld_Latn", "swh_Latn")
    one = build(n=400, right=0.6, metric=metric)
    copies = [replace(one, language=code) for code in codes]
    (of_one, *_), (together, *_) = summarise([one]), summarise(copies)
    alone, score = of_one.scores["mt-llm"]["swh_Latn"], together.scores["mt-llm"][AVERAGE]
    assert (score.low, score.high) == pytest.approx((alone.low, alone.high))
    others = [replace(item, keys=[f"{item.language}-{k}" for k in item.keys]) for item in copies]
    apart = summarise(others)[0].scores["mt-llm"][AVERAGE]
    assert 2 * (apart.high - apart.low) == pytest.approx(score.high - score.low, rel=0.2)


def test_intervals_do_not_depend_on_what_else_is_summarised():
    others = [build("llm", metric="macro_f1"), build(language="deu_Latn", metric="macro_f1")]
    items = [build(metric="macro_f1"), *others]
    alone = summarise(items[:1])[0].scores["mt-llm"]["swh_Latn"]
    random.Random(0).shuffle(items)
    assert summarise(items)[0].scores["mt-llm"]["swh_Latn"] == alone
    assert summarise(items, seed=1)[0].scores["mt-llm"]["swh_Latn"] != alone


def test_averages_are_over_languages_that_all_systems_have():
    statuses = dict.fromkeys(("deu_Latn", "swh_Latn", "nij_Latn", "fra_Latn"), "known")
    statuses |= {"nij_Latn": "fallback"}
    items = [
        build(system, language, seed, language_status=status if system == "mt-llm" else None)
        for system in ("llm", "mt-llm")
        for language, status in statuses.items()
        for seed in (42, 43, 44)
        if (system, language) != ("llm", "fra_Latn")
    ]
    (table,) = summarise(items)
    assert table.languages == dict(sorted(statuses.items()))
    assert table.averaged == {
        AVERAGE: ["deu_Latn", "nij_Latn", "swh_Latn"],
        KNOWN: ["deu_Latn", "swh_Latn"],
    }
    for system in ("llm", "mt-llm"):
        for name, members in table.averaged.items():
            per_seed = [right(items, system, seed, members) for seed in (42, 43, 44)]
            score = table.scores[system][name]
            assert score.value == pytest.approx(np.mean(per_seed))
            assert score.sd == pytest.approx(np.std(per_seed, ddof=1))
            widths = [table.scores[system][x].high - table.scores[system][x].low for x in members]
            assert score.low < score.value < score.high and score.high - score.low < min(widths)


def right(items: Sequence[Predictions], system: str, seed: int, languages: Sequence[str]) -> float:
    """The mean over languages of a system's accuracy with a seed."""
    mine = [x for x in items if x.system == system and x.seed == seed and x.language in languages]
    return np.mean([np.mean(x.labels == x.predictions) for x in mine])


def test_rows_are_matched_by_key_not_by_place():
    item, other = build(), build("llm")
    order = np.random.default_rng(0).permutation(60)
    columns = {"labels": other.labels[order], "predictions": other.predictions[order]}
    shuffled = replace(other, keys=[other.keys[i] for i in order], **columns)
    expected = compare([item, other], "mt-llm", "llm")
    assert compare([item, shuffled], "mt-llm", "llm") == expected


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="comes twice with the same seed"):
        summarise([build(), build()])
    other = build("llm", keys=[f"k{i + 1}" for i in range(60)])
    message = r"mt-llm / xnli / swh_Latn and llm / .* different examples: only one has 'k0'"
    with pytest.raises(ValueError, match=message):
        compare([build(), other], "mt-llm", "llm")
    with pytest.raises(ValueError, match="different labels for 'k"):
        compare([build(), build("llm", data=1)], "mt-llm", "llm")
    with pytest.raises(ValueError, match="seed 43 were asked different examples"):
        summarise([build(), replace(other, system="mt-llm", seed=43)])
    with pytest.raises(ValueError, match="no predictions of system 'lm'; there are llm, mt-llm"):
        compare([build(), build("llm")], "mt-llm", "lm")
    with pytest.raises(ValueError, match="'xnli' has predictions of different tasks"):
        summarise([build(), build("llm", metric="macro_f1")])
