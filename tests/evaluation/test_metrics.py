"""Metrics against definitions written out in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.evaluation.bootstrap import summarise
from mtllm_engine.evaluation.metrics import exact_match, macro_f1, token_f1
from tests.support.predictions import build

WORDS = ["The", "a", "an", "Katze", "кот", "猫が", "don't", "cat,", "cat", "--", "THE"]


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
    expected = pytest.approx(sum(f1) / num_classes)
    columns = {"labels": np.array(labels), "predictions": np.array(answers)}
    assert macro_f1(*columns.values(), num_classes) == expected
    item = build(n=n, metric="macro_f1", num_classes=num_classes, **columns)
    tables = {table.measure: table for table in summarise([item], resamples=2)}
    scores = {measure: table.scores["mt-llm"]["swh_Latn"] for measure, table in tables.items()}
    assert scores["macro_f1"].value == expected
    right = sum(label == answer for label, answer in zip(labels, answers))
    assert scores["accuracy"].value == pytest.approx(right / n)


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
    assert exact_match(prediction, answers) == match
    assert token_f1(prediction, answers) == pytest.approx(f1)


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
    precision, recall = (common / max(1, len(words(each))) for each in (predicted, expected))
    f1 = 2 * precision * recall / (precision + recall) if common else 0
    assert token_f1(" ".join(predicted), [" ".join(expected)]) == pytest.approx(f1)
