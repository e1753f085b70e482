"""Predictions as systems might have made them."""

import numpy as np

from mtllm_engine.evaluation.predictions import Predictions


def build(
    system: str = "mt-llm",
    language: str = "swh_Latn",
    seed: int = 42,
    *,
    n: int = 60,
    right: float = 0.7,
    classes: int = 3,
    data: int = 0,
    **fields,
) -> Predictions:
    """Random ones, of `n` examples; equal `data` and language are equal labels."""
    labels = np.random.default_rng(data).integers(0, classes, n)
    draw = np.random.default_rng([data, seed, *system.encode(), *language.encode()])
    answers = np.where(draw.random(n) < right, labels, draw.integers(0, classes, n))
    about = {"system": system, "dataset": "xnli", "language": language, "seed": seed}
    about |= {"metric": "accuracy", "num_classes": classes}
    columns = {"keys": [f"k{i}" for i in range(n)], "labels": labels, "predictions": answers}
    return Predictions(**about | columns | fields)
