"""What predictions are worth: macro-F1, exact match, token F1; and how sure a value is (bootstrap).

Shapes, beside the project's legend (data/batch.py): N examples, U distinct outcomes, X resamples, C classes.
"""

import hashlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def macro_f1(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> float:
    """The mean over all classes of the task of F1; 0 for a class that neither labels nor predictions have."""
    return float(weighted_macro_f1(labels_N, predictions_N, num_classes, np.ones((1, len(labels_N))))[0])


def weighted_macro_f1(
    labels_U: np.ndarray, predictions_U: np.ndarray, num_classes: int, weights_XU: np.ndarray
) -> np.ndarray:
    """`macro_f1` of X samples (X,), each of which holds outcome u `weights_XU[x, u]` times."""
    classes_C = np.arange(num_classes)
    labelled_UC = labels_U[:, None] == classes_C
    predicted_UC = predictions_U[:, None] == classes_C
    both_UC = np.concatenate([labelled_UC & predicted_UC, labelled_UC.astype(float) + predicted_UC], axis=1)
    hits_XC, either_XC = np.split(weights_XU @ both_UC, 2, axis=1)
    return np.mean(2 * hits_XC / np.maximum(either_XC, 1), axis=1)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the accepted answers, normalised as SQuAD 1.1 does, else 0."""
    return float(any(_normalised(prediction) == _normalised(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the prediction's words against those of an accepted answer, normalised as SQuAD 1.1 does.

    The normalisation (lower case; without ASCII punctuation and the words a, an, the) is applied to every language, as
    published. Words are what white space parts: where a script writes none, F1 is close to exact match.
    """
    return max((_word_f1(_normalised(prediction), _normalised(answer)) for answer in answers), default=0.0)


def bootstrap(
    outcomes_NM: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """A statistic of `resamples` samples, each of N examples drawn with replacement; float64 (X,).

    Examples with equal outcomes are interchangeable, so what is drawn is how often each distinct outcome comes up.

    Args:
        outcomes_NM: What the statistic needs to know of each example, a row each.
        statistic: Takes the distinct rows (U, M) and their counts in each sample (X, U); returns (X,).
    """
    distinct_UM, counts_U = np.unique(outcomes_NM, axis=0, return_counts=True)
    weights_XU = generator.multinomial(len(outcomes_NM), counts_U / len(outcomes_NM), size=resamples)
    return statistic(distinct_UM, weights_XU.astype(float))


def mean_statistic(outcomes_UM: np.ndarray, weights_XU: np.ndarray) -> np.ndarray:
    """The mean of the only column of the outcomes, for `bootstrap`."""
    return weights_XU @ outcomes_UM[:, 0] / weights_XU.sum(axis=1)


def interval(values_X: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    low, high = np.quantile(values_X, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def generator_for(*name: object) -> np.random.Generator:
    """A counter-based generator whose numbers depend on the name alone, not on what was drawn before."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(prediction: str, answer: str) -> float:
    predicted, expected = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
