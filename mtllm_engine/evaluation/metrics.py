"""What predictions are worth: macro-F1, exact match, token F1."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

MEASURES = {
    "accuracy": ("accuracy",),
    "macro_f1": ("macro_f1", "accuracy"),
    "exact_match_f1": ("exact_match", "f1"),
}
"""What is reported of a task's metric."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def macro_f1(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> float:
    """The mean over all classes of the task of F1: 0 for one that neither labels nor predictions
    have."""
    weights_1N = np.ones((1, len(labels_N)))
    return float(weighted_macro_f1(labels_N, predictions_N, num_classes, weights_1N)[0])


def weighted_macro_f1(
    labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, weights_XN: np.ndarray
) -> np.ndarray:
    """`macro_f1` of X samples (X,), each of which holds example n `weights_XN[x, n]` times."""
    classes_Y = np.arange(num_classes)
    labelled_NY = labels_N[:, None] == classes_Y
    predicted_NY = predictions_N[:, None] == classes_Y
    # One product weighs both: right answers of each class, and its labels and predictions.
    right_NY = labelled_NY & predicted_NY
    either_NY = labelled_NY.astype(weights_XN.dtype) + predicted_NY
    sums = weights_XN @ np.concatenate([right_NY, either_NY], axis=1)
    right_XY, either_XY = np.split(sums, 2, axis=1)
    return np.mean(2 * right_XY / np.maximum(either_XY, 1), axis=1)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the accepted answers, normalised as SQuAD 1.1 does, else 0."""
    return float(any(_normalised(prediction) == _normalised(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the prediction's words against those of an accepted answer, normalised as
    SQuAD 1.1 does.

    The normalisation (lower case; without ASCII punctuation and the words a, an, the) is applied to
    every language, as published. Words are what white space parts: where a script writes none, F1
    is close to exact match.
    """
    words = _normalised(prediction)
    return max((_word_f1(words, _normalised(answer)) for answer in answers), default=0.0)


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(prediction: str, answer: str) -> float:
    predicted, expected = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
