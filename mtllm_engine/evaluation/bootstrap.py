"""What predictions come to: every system's value in every language, and how sure it is.

A system's value in a language is its mean over seeds. Its interval is the 95 % percentile bootstrap
over the examples; seeds, systems and languages that share the examples' keys are resampled
together, since test sets are mostly translations of one another: what is hard in one language is in
the others. An average counts every language alike, but English, which the task was learned in.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mtllm_engine.evaluation.metrics import (
    MEASURES,
    exact_match,
    macro_f1,
    token_f1,
    weighted_macro_f1,
)
from mtllm_engine.evaluation.predictions import COSTS, STATUSES, Predictions, plain
from mtllm_engine.languages import ENGLISH

CONFIDENCE = 0.95
AVERAGE, KNOWN = "average", "average, known"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A value from 0 to 1 (or a difference of two), its interval, its deviation over seeds."""

    value: float
    low: float
    high: float
    sd: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """One measure on one dataset. Averages are over the languages for which every system has
    predictions."""

    dataset: str
    measure: str
    languages: Mapping[str, str | None]
    """With the worst status that a system reports."""
    given: Mapping[str, str]
    """Language -> the one whose token encoders got; "" for none."""
    averaged: Mapping[str, Sequence[str]]
    """AVERAGE and KNOWN (every system's encoder has it) -> their languages."""
    scores: Mapping[str, Mapping[str, Score]]
    """System -> language or average -> score."""
    costs: Mapping[str, Mapping[str, float | None]]
    """System -> COSTS, means over its files."""
    chance: float | None
    """Accuracy of guessing."""
    translated: Mapping[str, Mapping[str, Mapping[str, int]]]
    """System -> language -> `examples` that were translated, how many of them were `cut` at the
    translator's positions, and of how many the translation is `unfinished`; so for `segments`."""
    translated_by: Mapping[str, str]
    """System -> what was translated at a time: "sentences" or "lines"."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paired difference ours - theirs of one measure on one dataset, on the same examples."""

    dataset: str
    measure: str
    ours: str
    theirs: str
    scores: Mapping[str, Score]  # language or average -> difference


def summarise(
    predictions: Sequence[Predictions], *, resamples: int = 1000, seed: int = 0
) -> list[Table]:
    """A table for each dataset and measure.

    Raises:
        ValueError: Seeds of one system differ in their examples, or systems in what the dataset is.
    """
    tables = []
    for dataset, systems in _cells(predictions).items():
        runs = [item for item in predictions if item.dataset == dataset]
        for measure in MEASURES[_metric(dataset, systems)]:
            tables.append(_table(measure, runs, systems, resamples, seed))
    return tables


def compare(
    predictions: Sequence[Predictions],
    ours: str,
    theirs: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Comparison]:
    """Paired bootstrap of ours - theirs, in the languages that both have; examples are resampled
    for both at once.

    Raises:
        ValueError: A system has no predictions, or the two were not asked the same examples.
    """
    present = {item.system for item in predictions}
    for system in (ours, theirs):
        if system not in present:
            systems = ", ".join(sorted(present))
            raise ValueError(f"no predictions of system {system!r}; there are {systems}")
    comparisons = []
    for dataset, cells in _cells(predictions).items():
        if not (ours in cells and theirs in cells):
            continue
        for measure in MEASURES[_metric(dataset, cells)]:
            scores = _differences(measure, cells[ours], cells[theirs], resamples, seed)
            about = {"dataset": dataset, "measure": measure, "ours": ours, "theirs": theirs}
            comparisons.append(Comparison(**about, scores=scores))
    return comparisons


class _Cell:
    """One system on one dataset in one language: its seeds, on the same examples in one order."""

    def __init__(self, runs: Sequence[Predictions]) -> None:
        self.runs = sorted(runs, key=lambda run: run.seed)
        first = self.runs[0]
        self.num_classes = first.num_classes
        self.keys, self.labels, self.predictions = sorted(first.keys), [], []
        for run in self.runs:
            order = sorted(range(len(run.keys)), key=run.keys.__getitem__)
            keys, labels, answers = (
                [column[index] for index in order]
                for column in (run.keys, plain(run.labels), plain(run.predictions))
            )
            self.labels = self.labels or labels
            _check_same(self, keys, labels, f"seed {run.seed}")
            self.predictions.append(answers)

    @property
    def name(self) -> str:
        return " / ".join(self.runs[0].identity[:3])

    def values(self, measure: str) -> np.ndarray:
        """(seeds, N): of a measure that is a mean over examples, what it is on each."""
        if measure == "accuracy":
            return (np.array(self.predictions) == np.array(self.labels)).astype(float)
        score = {"exact_match": exact_match, "f1": token_f1}[measure]
        pairs = [zip(answers, self.labels) for answers in self.predictions]
        return np.array([[score(*pair) for pair in of_seed] for of_seed in pairs])

    def by_seed(self, measure: str) -> dict[int, float]:
        seeds = [run.seed for run in self.runs]
        if measure == "macro_f1":
            labels_N = np.array(self.labels)
            runs = [np.array(answers) for answers in self.predictions]
            values = [macro_f1(labels_N, answers_N, self.num_classes) for answers_N in runs]
            return dict(zip(seeds, values))
        return dict(zip(seeds, self.values(measure).mean(axis=1).tolist()))

    def resampled(self, measure: str, resamples: int, seed: int) -> np.ndarray:
        """(X,): the mean over seeds in each resample, the same ones for all cells of these keys."""
        weights_XN = _weights(tuple(self.keys), resamples, seed)
        if measure != "macro_f1":
            return weights_XN @ self.values(measure).mean(axis=0) / len(self.keys)
        labels_N = np.array(self.labels)
        runs = [np.array(answers) for answers in self.predictions]
        options = {"num_classes": self.num_classes, "weights_XN": weights_XN}
        return np.mean([weighted_macro_f1(labels_N, each, **options) for each in runs], axis=0)


@lru_cache(maxsize=1)  # languages mostly share their keys
def _weights(keys: tuple[str, ...], resamples: int, seed: int) -> np.ndarray:
    return bootstrap_weights(len(keys), resamples, generator_for(seed, keys))


def _cells(predictions: Sequence[Predictions]) -> dict[str, dict[str, dict[str, _Cell]]]:
    """Dataset -> system -> language -> cell, each in alphabetical order, of what has rows."""
    runs: dict[tuple, list[Predictions]] = defaultdict(list)
    for item in filter(lambda item: len(item.keys), predictions):
        runs[item.dataset, item.system, item.language].append(item)
    cells: dict[str, dict[str, dict[str, _Cell]]] = {}
    for (dataset, system, language), items in sorted(runs.items()):
        seeds = [item.seed for item in items]
        if len(set(seeds)) < len(seeds):
            name = f"{system} / {dataset} / {language}"
            raise ValueError(f"{name} comes twice with the same seed; remove one")
        cells.setdefault(dataset, {}).setdefault(system, {})[language] = _Cell(items)
    return cells


def _metric(dataset: str, systems: Mapping[str, Mapping[str, _Cell]]) -> str:
    runs = [run for cells in systems.values() for cell in cells.values() for run in cell.runs]
    kinds = sorted({(run.metric, run.num_classes) for run in runs})
    if len(kinds) > 1:
        tasks = ", ".join(f"{metric} over {classes} classes" for metric, classes in kinds)
        message = f"dataset {dataset!r} has predictions of different tasks ({tasks})"
        raise ValueError(f"{message}; give them different names")
    return kinds[0][0]


def _table(
    measure: str,
    runs: Sequence[Predictions],
    systems: Mapping[str, Mapping[str, _Cell]],
    resamples: int,
    seed: int,
) -> Table:
    """Of one dataset. Args: runs: all, those without rows too."""
    # What is averaged: a language that one system lacks would make averages of different things.
    languages = {name: _status(runs, name) for name in sorted({run.language for run in runs})}
    common = set.intersection(*(set(cells) for cells in systems.values()))
    averaged = _averaged({name: each for name, each in languages.items() if name in common})
    # Each system's scores: resamples are the same for all languages with the same examples, so that
    # an average's interval knows that these stand or fall together.
    scores, costs = {}, {}
    for system, cells in systems.items():
        samples = {name: cell.resampled(measure, resamples, seed) for name, cell in cells.items()}
        by_seed = {name: cell.by_seed(measure) for name, cell in cells.items()}
        scores[system] = {name: _score(by_seed[name], samples[name]) for name in cells}
        for name, part in averaged.items():
            values = _average_by_seed([by_seed[language] for language in part])
            value = float(np.mean([scores[system][language].value for language in part]))
            mean_X = np.mean([samples[language] for language in part], axis=0)
            scores[system][name] = _score(values, mean_X, value)
        costs[system] = _costs([run for cell in cells.values() for run in cell.runs])
    # What guessing comes to: all cells of a dataset have the same classes.
    num_classes = next(iter(next(iter(systems.values())).values())).num_classes
    return Table(
        dataset=runs[0].dataset,
        measure=measure,
        languages=languages,
        given={language: _given(runs, language) for language in languages},
        averaged=averaged,
        scores=scores,
        costs=costs,
        chance=1 / num_classes if measure == "accuracy" else None,
        translated=_translated(runs),
        translated_by=_translated_by(runs),
    )


def _translated(runs: Sequence[Predictions]) -> dict[str, dict[str, dict[str, int]]]:
    """Of seeds, which translate the same texts, the most."""
    translated: dict[str, dict[str, dict[str, int]]] = {}
    for run in runs:
        if new := run.translation_counts:
            counts = translated.setdefault(run.system, {}).setdefault(run.language, {})
            counts |= {name: max(count, counts.get(name, 0)) for name, count in new.items()}
    return translated


def _translated_by(runs: Sequence[Predictions]) -> dict[str, str]:
    """Of systems whose predictions say so; in a table all that one system has say the same."""
    settings = {run.system: run.maker["settings"] for run in runs if run.maker}
    key = "evaluate.translate_by"
    return {system: each[key] for system, each in settings.items() if key in each}


def _differences(
    measure: str, ours: Mapping[str, _Cell], theirs: Mapping[str, _Cell], resamples: int, seed: int
) -> dict[str, Score]:
    # Of each language, in resamples that are the same for both systems.
    samples, values = {}, {}
    for language in sorted(set(ours) & set(theirs)):
        pair = (ours[language], theirs[language])
        _check_same(pair[0], pair[1].keys, pair[1].labels, pair[1].name)
        first_X, second_X = (cell.resampled(measure, resamples, seed) for cell in pair)
        samples[language] = first_X - second_X
        means = [np.mean(list(cell.by_seed(measure).values())) for cell in pair]
        values[language] = float(means[0] - means[1])
    # And of the averages of these languages.
    runs = [run for cells in (ours, theirs) for cell in cells.values() for run in cell.runs]
    averaged = _averaged({language: _status(runs, language) for language in values})
    scores = {language: _score({}, samples[language], values[language]) for language in values}
    for name, part in averaged.items():
        value = float(np.mean([values[language] for language in part]))
        mean_X = np.mean([samples[language] for language in part], axis=0)
        scores[name] = _score({}, mean_X, value)
    return scores


def _averaged(statuses: Mapping[str, str | None]) -> dict[str, list[str]]:
    """The averages, by name, and their languages; an average of none is left out.

    Args:
        statuses: Of the languages that all systems have.
    """
    foreign = [language for language in statuses if language != ENGLISH]
    known = [language for language in foreign if statuses[language] == "known"]
    return {name: part for name, part in ((AVERAGE, foreign), (KNOWN, known)) if part}


def _score(
    by_seed: Mapping[int, float], samples_X: np.ndarray, value: float | None = None
) -> Score:
    values = list(by_seed.values())
    low, high = interval(samples_X)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    value = float(np.mean(values)) if value is None else value
    return Score(value=value, low=low, high=high, sd=sd)


def _average_by_seed(languages: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The average of each seed that all languages have."""
    common = sorted(set.intersection(*map(set, languages)))
    return {seed: float(np.mean([by_seed[seed] for by_seed in languages])) for seed in common}


def _status(runs: Sequence[Predictions], language: str) -> str | None:
    """The worst that a system reports of the language."""
    reported = [run.language_status for run in runs if run.language == language]
    ranks = [STATUSES.index(status) for status in reported if status]
    return STATUSES[max(ranks)] if ranks else None


def _given(runs: Sequence[Predictions], language: str) -> str:
    """What encoders got for the language: more than one, where systems have different ones; "" for
    none."""
    given = {run.language_given for run in runs if run.language == language}
    return " and ".join(sorted(given - {None}))


def _costs(runs: Sequence[Predictions]) -> dict[str, float | None]:
    costs: dict[str, float | None] = {}
    for name in COSTS:
        known = [getattr(run, name) for run in runs if getattr(run, name) is not None]
        costs[name] = float(np.mean(known)) if known else None
    return costs


def _check_same(cell: _Cell, keys: Sequence[str], labels: Sequence, other: str) -> None:
    both = f"{cell.name} and {other}"
    if cell.keys != keys:
        key = sorted(set(cell.keys) ^ set(keys))[0]
        raise ValueError(f"{both} were asked different examples: only one has {key!r}")
    if cell.labels != labels:
        labelled = zip(keys, cell.labels, labels)
        key = next(key for key, ours, theirs in labelled if ours != theirs)
        raise ValueError(f"{both} have different labels for {key!r}")


def bootstrap_weights(
    num_examples: int, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """How often each example comes up in each sample, drawn with replacement; fp32 (X, N)."""
    shares_N = np.full(num_examples, 1 / num_examples)
    drawn_XN = generator.multinomial(num_examples, shares_N, size=resamples)
    return drawn_XN.astype(np.float32)  # whole numbers, so exact


def interval(values_X: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    low, high = np.quantile(values_X, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def generator_for(*name: object) -> np.random.Generator:
    """A counter-based generator: its numbers depend on the name alone, not on earlier draws."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
