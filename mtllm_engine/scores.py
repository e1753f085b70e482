"""What predictions are worth: macro-F1, exact match, token F1; and how sure a value is (bootstrap).

Shapes, beside the project's legend (data/batch.py): N examples, X resamples, C classes.
"""

import hashlib
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def macro_f1(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> float:
    """The mean over all classes of the task of F1; 0 for a class that neither labels nor predictions have."""
    return float(weighted_macro_f1(labels_N, predictions_N, num_classes, np.ones((1, len(labels_N))))[0])


def weighted_macro_f1(
    labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, weights_XN: np.ndarray
) -> np.ndarray:
    """`macro_f1` of X samples (X,), each of which holds example n `weights_XN[x, n]` times."""
    classes_C = np.arange(num_classes)
    labelled_NC = labels_N[:, None] == classes_C
    predicted_NC = predictions_N[:, None] == classes_C
    both_NC = np.concatenate([labelled_NC & predicted_NC, labelled_NC.astype(weights_XN.dtype) + predicted_NC], axis=1)
    hits_XC, either_XC = np.split(weights_XN @ both_NC, 2, axis=1)
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


def bootstrap_weights(num_examples: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each example comes up in each of the samples, drawn with replacement; float32 (X, N)."""
    drawn_XN = generator.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=resamples)
    return drawn_XN.astype(np.float32)  # whole numbers, so exact


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
