"""Predictions in files, and what they come to: one table of every system in every language, with intervals.

A system's value in a language is its mean over seeds. Its interval is the 95 % percentile bootstrap over the examples;
seeds, systems and languages that share the examples' keys are resampled together, since test sets are mostly
translations of one another: what is hard in one language is in the others. An average counts every language alike, but
English, which the task was learned in.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.scores import (
    bootstrap_weights,
    exact_match,
    generator_for,
    interval,
    macro_f1,
    token_f1,
    weighted_macro_f1,
)
from mtllm_engine.tables import AVERAGE, COSTS, KNOWN, STATUSES, Comparison, Score, Table, csv_text, markdown, plot

FORMAT = "mtllm-predictions/1"
TRAINED = "eng_Latn"  # what tasks are learned in: no average counts it
MEASURES = {  # what is reported of a task's metric
    "accuracy": ("accuracy",),
    "macro_f1": ("macro_f1", "accuracy"),
    "exact_match_f1": ("exact_match", "f1"),
}
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What one system (with one seed) says of one dataset in one language.

    There are no rows where it can say nothing, for its encoder has no token for the language: status "unknown".

    Raises:
        ValueError: The numbers of rows differ, a key repeats, a class is out of range, or a name fits no file name.
    """

    system: str
    dataset: str
    language: str
    seed: int
    metric: str  # a key of MEASURES
    keys: Sequence[str]
    labels: np.ndarray | Sequence[Sequence[str]]  # int64 (N,); for exact_match_f1 the accepted answers of each example
    predictions: np.ndarray | Sequence[str]  # int64 (N,); for exact_match_f1 the answer given
    num_classes: int = 0
    language_status: str | None = None  # one of STATUSES: has the encoder the language; None without an encoder
    language_given: str | None = None  # the language whose token the encoder got
    latency_s: float | None = None  # for 1,000 examples, translating included, whichever run did it
    gpu_hours: float | None = None  # that the system took to make; the same in each of its files
    flops: float | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"predictions of {' / '.join(map(str, self.identity))}: {problem}")

    @property
    def identity(self) -> tuple[str, str, str, int]:
        return self.system, self.dataset, self.language, self.seed


def save(folder: Path | str, predictions: Predictions) -> Path:
    """Writes DATASET/SYSTEM/predictions-LANGUAGE-SEED.jsonl, whole or not at all: a header line, then a line a row."""
    path = Path(folder) / predictions.dataset / predictions.system
    path = path / f"predictions-{predictions.language}-{predictions.seed}.jsonl"
    columns = ("keys", "labels", "predictions")
    header = {"format": FORMAT, "rows": len(predictions.keys)}
    header |= {
        field.name: getattr(predictions, field.name) for field in fields(Predictions) if field.name not in columns
    }
    rows = zip(predictions.keys, _plain(predictions.labels), _plain(predictions.predictions))
    lines = [header, *({"key": key, "label": label, "prediction": answer} for key, label, answer in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def load(folder: Path | str) -> list[Predictions]:
    """All predictions below a folder.

    Raises:
        ValueError: There are none, a file is damaged, or two hold the same system, dataset, language and seed.
    """
    found: dict[tuple, Path] = {}
    loaded = []
    for path in sorted(Path(folder).rglob("predictions-*.jsonl")):
        loaded.append(_read(path))
        identity = loaded[-1].identity
        if identity in found:
            raise ValueError(f"{found[identity]} and {path} both hold {' / '.join(map(str, identity))}; remove one")
        found[identity] = path
    if not loaded:
        raise ValueError(f"no predictions-*.jsonl below {folder}; evaluate a system first")
    return loaded


def summarise(predictions: Sequence[Predictions], *, resamples: int = 1000, seed: int = 0) -> list[Table]:
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
    predictions: Sequence[Predictions], ours: str, theirs: str, *, resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Paired bootstrap of ours - theirs, in the languages that both have; examples are resampled for both at once.

    Raises:
        ValueError: A system has no predictions, or the two were not asked the same examples.
    """
    present = {item.system for item in predictions}
    for system in (ours, theirs):
        if system not in present:
            raise ValueError(f"no predictions of system {system!r}; there are {', '.join(sorted(present))}")
    comparisons = []
    for dataset, systems in _cells(predictions).items():
        if ours in systems and theirs in systems:
            for measure in MEASURES[_metric(dataset, systems)]:
                scores = _differences(measure, systems[ours], systems[theirs], resamples, seed)
                comparisons.append(
                    Comparison(dataset=dataset, measure=measure, ours=ours, theirs=theirs, scores=scores)
                )
    return comparisons


def write(folder: Path | str, *, baseline: str | None = None, resamples: int = 1000, seed: int = 0) -> Path:
    """Writes results.csv, .json, .md and a picture for each table (results-DATASET-MEASURE.png) beside the predictions.

    Args:
        baseline: A system that every other one is compared with, paired; None compares none.

    Returns:
        The path of results.md.
    """
    folder = Path(folder)
    predictions = load(folder)
    options = {"resamples": resamples, "seed": seed}
    tables = summarise(predictions, **options)
    others = sorted({item.system for item in predictions} - {baseline}) if baseline else []
    comparisons = [item for system in others for item in compare(predictions, system, baseline, **options)]
    content = {"tables": [asdict(table) for table in tables], "comparisons": [_as_dict(item) for item in comparisons]}
    _write(folder / "results.json", json.dumps(content, indent=1) + "\n")
    _write(folder / "results.csv", csv_text(tables))
    _write(folder / "results.md", markdown(tables, comparisons, resamples))
    for table in tables:
        plot(table, folder / f"results-{table.dataset}-{table.measure}.png")
    return folder / "results.md"


class _Cell:
    """One system on one dataset in one language: its seeds, on the same examples in the same order."""

    def __init__(self, runs: Sequence[Predictions]) -> None:
        self.runs = sorted(runs, key=lambda run: run.seed)
        first = self.runs[0]
        self.num_classes = first.num_classes
        self.keys, self.labels, self.predictions = sorted(first.keys), [], []
        for run in self.runs:
            order = sorted(range(len(run.keys)), key=run.keys.__getitem__)
            keys, labels, answers = (
                [column[index] for index in order] for column in (run.keys, _plain(run.labels), _plain(run.predictions))
            )
            self.labels = self.labels or labels
            _check_same(self, keys, labels, f"seed {run.seed}")
            self.predictions.append(answers)

    @property
    def name(self) -> str:
        return " / ".join(self.runs[0].identity[:3])

    def values(self, measure: str) -> np.ndarray:
        """What each seed (row) has on each example (column), for measures that are means over examples."""
        if measure == "accuracy":
            return (np.array(self.predictions) == np.array(self.labels)).astype(float)
        score = {"exact_match": exact_match, "f1": token_f1}[measure]
        return np.array([[score(*pair) for pair in zip(answers, self.labels)] for answers in self.predictions])

    def by_seed(self, measure: str) -> dict[int, float]:
        seeds = [run.seed for run in self.runs]
        if measure == "macro_f1":
            labels_N = np.array(self.labels)
            return {
                seed: macro_f1(labels_N, np.array(answers), self.num_classes)
                for seed, answers in zip(seeds, self.predictions)
            }
        return dict(zip(seeds, self.values(measure).mean(axis=1).tolist()))

    def resampled(self, measure: str, resamples: int, seed: int) -> np.ndarray:
        """The mean over seeds in each of the resamples (X,), which are the same ones for all cells of these keys."""
        weights_XN = _weights(tuple(self.keys), resamples, seed)
        if measure != "macro_f1":
            return weights_XN @ self.values(measure).mean(axis=0) / len(self.keys)
        labels_N = np.array(self.labels)
        runs = (weighted_macro_f1(labels_N, np.array(run), self.num_classes, weights_XN) for run in self.predictions)
        return np.mean(list(runs), axis=0)


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
            raise ValueError(f"{system} / {dataset} / {language} comes twice with the same seed; remove one")
        cells.setdefault(dataset, {}).setdefault(system, {})[language] = _Cell(items)
    return cells


def _metric(dataset: str, systems: Mapping[str, Mapping[str, _Cell]]) -> str:
    runs = [run for cells in systems.values() for cell in cells.values() for run in cell.runs]
    kinds = sorted({(run.metric, run.num_classes) for run in runs})
    if len(kinds) > 1:
        told = ", ".join(f"{metric} over {classes} classes" for metric, classes in kinds)
        raise ValueError(f"dataset {dataset!r} has predictions of different tasks ({told}); give them different names")
    return kinds[0][0]


def _table(
    measure: str, runs: Sequence[Predictions], systems: Mapping[str, Mapping[str, _Cell]], resamples: int, seed: int
) -> Table:
    """Of one dataset. Args: runs: all, those without rows too."""
    dataset = runs[0].dataset
    languages = {language: _status(runs, language) for language in sorted({run.language for run in runs})}
    foreign = [language for language in languages if language != TRAINED]
    common = [language for language in foreign if all(language in cells for cells in systems.values())]
    averaged = {AVERAGE: common, KNOWN: [language for language in common if languages[language] == "known"]}
    averaged = {name: members for name, members in averaged.items() if members}
    scores, costs = {}, {}
    for system, cells in systems.items():
        samples = {language: cell.resampled(measure, resamples, seed) for language, cell in cells.items()}
        by_seed = {language: cell.by_seed(measure) for language, cell in cells.items()}
        scores[system] = {language: _score(by_seed[language], samples[language]) for language in cells}
        for name, members in averaged.items():
            values = _average_by_seed([by_seed[language] for language in members])
            value = float(np.mean([scores[system][language].value for language in members]))
            scores[system][name] = _score(values, np.mean([samples[item] for item in members], axis=0), value)
        costs[system] = _costs([run for cell in cells.values() for run in cell.runs])
    num_classes = next(iter(next(iter(systems.values())).values())).num_classes
    chance = 1 / num_classes if measure == "accuracy" else None
    return Table(
        dataset=dataset,
        measure=measure,
        languages=languages,
        given={language: _given(runs, language) for language in languages},
        averaged=averaged,
        scores=scores,
        costs=costs,
        chance=chance,
    )


def _differences(
    measure: str, ours: Mapping[str, _Cell], theirs: Mapping[str, _Cell], resamples: int, seed: int
) -> dict[str, Score]:
    samples, values = {}, {}
    for language in sorted(set(ours) & set(theirs)):
        pair = (ours[language], theirs[language])
        _check_same(pair[0], pair[1].keys, pair[1].labels, pair[1].name)
        first_X, second_X = (cell.resampled(measure, resamples, seed) for cell in pair)
        samples[language] = first_X - second_X
        means = [np.mean(list(cell.by_seed(measure).values())) for cell in pair]
        values[language] = float(means[0] - means[1])
    runs = [run for cells in (ours, theirs) for cell in cells.values() for run in cell.runs]
    foreign = [language for language in values if language != TRAINED]
    known = [language for language in foreign if _status(runs, language) == "known"]
    scores = {language: _score({}, samples[language], values[language]) for language in values}
    for name, members in ((AVERAGE, foreign), (KNOWN, known)):
        if members:
            average = float(np.mean([values[language] for language in members]))
            scores[name] = _score({}, np.mean([samples[item] for item in members], axis=0), average)
    return scores


def _score(by_seed: Mapping[int, float], samples_X: np.ndarray, value: float | None = None) -> Score:
    values = list(by_seed.values())
    low, high = interval(samples_X)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(value=float(np.mean(values)) if value is None else value, low=low, high=high, sd=sd)


def _average_by_seed(languages: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The average of each seed that all languages have."""
    common = sorted(set.intersection(*map(set, languages)))
    return {seed: float(np.mean([by_seed[seed] for by_seed in languages])) for seed in common}


def _status(runs: Sequence[Predictions], language: str) -> str | None:
    """The worst that a system reports of the language."""
    found = [STATUSES.index(run.language_status) for run in runs if run.language == language and run.language_status]
    return STATUSES[max(found)] if found else None


def _given(runs: Sequence[Predictions], language: str) -> str:
    """What encoders got for the language: more than one, where systems have different ones; "" for none."""
    return " and ".join(sorted({run.language_given for run in runs if run.language == language} - {None}))


def _costs(runs: Sequence[Predictions]) -> dict[str, float | None]:
    found = {name: [getattr(run, name) for run in runs if getattr(run, name) is not None] for name in COSTS}
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    excluding = [name for name, score in comparison.scores.items() if score.excludes_zero]
    return asdict(comparison) | {"excludes_zero": excluding}


def _check_same(cell: _Cell, keys: Sequence[str], labels: Sequence, other: str) -> None:
    if cell.keys != keys:
        differing = sorted(set(cell.keys) ^ set(keys))
        raise ValueError(f"{cell.name} and {other} were asked different examples: only one has {differing[0]!r}")
    if cell.labels != labels:
        index = next(index for index, pair in enumerate(zip(cell.labels, labels)) if pair[0] != pair[1])
        raise ValueError(f"{cell.name} and {other} have different labels for {cell.keys[index]!r}")


def _problem(item: Predictions) -> str | None:
    """What is wrong with predictions, if anything."""
    names = [name for name in (item.system, item.dataset, item.language) if not _NAME.fullmatch(name)]
    if names:
        return f"{names[0]!r} is no name; use letters, digits and _ . + -"
    if item.metric not in MEASURES:
        return f"metric {item.metric!r} is none of {', '.join(MEASURES)}"
    if item.language_status not in (None, *STATUSES):
        return f"language_status {item.language_status!r} is none of {', '.join(STATUSES)}"
    least = 0 if item.language_status == "unknown" else 1
    if not len(item.keys) == len(item.labels) == len(item.predictions) >= least:
        return f"{len(item.keys)} keys, {len(item.labels)} labels, {len(item.predictions)} predictions"
    if len(set(item.keys)) < len(item.keys):
        seen: set[str] = set()
        return f"key {next(key for key in item.keys if key in seen or seen.add(key))!r} comes twice"
    if item.metric == "exact_match_f1" or not len(item.keys):
        return None
    for name in ("labels", "predictions"):
        classes = np.asarray(getattr(item, name))
        outside = classes.dtype.kind not in "iu" or (classes < 0) | (classes >= item.num_classes)
        if np.any(outside):
            key, found = item.keys[int(np.argmax(outside))], classes[int(np.argmax(outside))]
            return f"{name} has {found} for key {key!r}, not a class from 0 to {item.num_classes - 1}"
    return None


def _plain(column: Any) -> list:
    return column.tolist() if isinstance(column, np.ndarray) else list(map(_plain_answers, column))


def _plain_answers(answers: Any) -> Any:
    return list(answers) if isinstance(answers, tuple) else answers


def _read(path: Path) -> Predictions:
    number = 0
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
        rows = []
        for number, line in enumerate(lines, start=1):  # noqa: B007 (told when a line is damaged)
            rows.append(json.loads(line))
        header = rows.pop(0)
        if header.pop("format") != FORMAT or header.pop("rows") != len(rows):
            raise ValueError(f"not a whole {FORMAT} file")
        columns = {name: [row[name] for row in rows] for name in ("key", "label", "prediction")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: damaged ({error}); evaluate again") from error
    wanted = {field.name for field in fields(Predictions)}
    if unknown := set(header) - wanted:
        raise ValueError(f"{path}, line 1: unknown field {min(unknown)!r}")
    is_text = header.get("metric") == "exact_match_f1"
    labels, answers = (columns[name] if is_text else np.array(columns[name]) for name in ("label", "prediction"))
    try:
        return Predictions(**header, keys=columns["key"], labels=labels, predictions=answers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _write(path: Path, content: str) -> None:
    """A file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
