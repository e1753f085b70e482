"""What systems answered, in files: a line for each example, whole or not at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.evaluation.metrics import MEASURES
from mtllm_engine.files import is_name, write_text

FORMAT = "mtllm-predictions/1"
STATUSES = ("known", "fallback", "unknown")
"""Whether a system's encoder has the language, from best to worst."""
COSTS = ("latency_s", "gpu_hours", "flops")
TRANSLATION_COUNTS = ("cut", "unfinished", "segments", "cut_segments", "unfinished_segments")
"""Of examples, of which older predictions have no more, and of segments."""
COLUMNS = ("keys", "labels", "predictions")
FIELDS = ("key", "label", "prediction")
"""Of a file's line, in the order of COLUMNS."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What one system (with one seed) says of one dataset in one language.

    There are no rows where it can say nothing, for its encoder has no token for the language:
    status "unknown".

    Raises:
        ValueError: The numbers of rows differ, a key repeats, a class is out of range, or a name
            fits no file name.
    """

    system: str
    dataset: str
    language: str
    seed: int
    metric: str  # a key of MEASURES
    keys: Sequence[str]
    labels: np.ndarray | Sequence[Sequence[str]]
    """int64 (N,); for exact_match_f1 the accepted answers of each example."""
    predictions: np.ndarray | Sequence[str]
    """int64 (N,); for exact_match_f1 the answer given."""
    num_classes: int = 0
    language_status: str | None = None
    """One of STATUSES: has the encoder the language; None without an encoder."""
    language_given: str | None = None
    """The language whose token the encoder got."""
    latency_s: float | None = None
    """For 1,000 examples, translating included, whichever run did it."""
    gpu_hours: float | None = None
    """That the system took to make, like `flops`; the same in each of its files."""
    flops: float | None = None
    cut: int | None = None
    """Examples with a text that was longer than the translator's positions, so that its end was
    not translated; None where none was translated."""
    unfinished: int | None = None
    """Examples with a translation that was stopped before its end, like a loop."""
    segments: int | None = None
    """Sentences or lines that were translated one by one, repeated ones each time; None as `cut`,
    or where nobody counted."""
    cut_segments: int | None = None
    unfinished_segments: int | None = None
    maker: Mapping[str, Any] | None = None
    """What made them (`provenance`); None: not known."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"predictions of {' / '.join(map(str, self.identity))}: {problem}")

    @property
    def identity(self) -> tuple[str, str, str, int]:
        return self.system, self.dataset, self.language, self.seed

    @property
    def translation_counts(self) -> dict[str, int]:
        """How many examples and segments were translated, and what became of them; without those
        of which not all is known."""
        counts: dict[str, int] = {}
        for names in (TRANSLATION_COUNTS[:2], TRANSLATION_COUNTS[2:]):
            new = {name: getattr(self, name) for name in names}
            if None in new.values():
                break
            counts |= new
        return {"examples": len(self.keys)} | counts if counts else {}


def save(folder: Path | str, predictions: Predictions) -> Path:
    """Writes DATASET/SYSTEM/predictions-LANGUAGE-SEED.jsonl: a header line, then a line a row."""
    path = path_of(folder, *predictions.identity)
    names = [each.name for each in fields(Predictions)]
    header = {"format": FORMAT, "rows": len(predictions.keys)}
    header |= {name: getattr(predictions, name) for name in names if name not in COLUMNS}
    columns = [plain(getattr(predictions, name)) for name in COLUMNS]
    rows = [dict(zip(FIELDS, row)) for row in zip(*columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    header["sha256"] = ""  # of the whole file, as it is with this left empty
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows)]
    digest = _digest("".join(lines))
    lines[0] = json.dumps(header | {"sha256": digest}, ensure_ascii=False) + "\n"
    write_text(path, "".join(lines))
    return path


def path_of(folder: Path | str, system: str, dataset: str, language: str, seed: int) -> Path:
    """Where `save` puts predictions."""
    return Path(folder) / dataset / system / f"predictions-{language}-{seed}.jsonl"


def load(folder: Path | str, damaged: list[str] | None = None) -> list[Predictions]:
    """All predictions below a folder, or those of one file.

    Args:
        damaged: Gets a line for each damaged file, which is left out; None: it is refused.

    Raises:
        ValueError: There are none, a file is damaged, or two hold the same system, dataset,
            language and seed.
    """
    paths: dict[tuple, Path] = {}
    loaded = []
    folder = Path(folder)
    found = [folder] if folder.is_file() else sorted(folder.rglob("predictions-*.jsonl"))
    for path in found:
        try:
            loaded.append(_read(path))
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            continue
        identity = loaded[-1].identity
        if identity in paths:
            both = " / ".join(map(str, identity))
            raise ValueError(f"{paths[identity]} and {path} both hold {both}; remove one")
        paths[identity] = path
    if damaged and not loaded:
        raise ValueError(damaged[0])
    if not loaded:
        raise ValueError(f"no predictions-*.jsonl below {folder}; evaluate a system first")
    return loaded


def plain(column: Any) -> list:
    """A column as JSON has it."""
    return column.tolist() if isinstance(column, np.ndarray) else list(map(_plain_answers, column))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_answers(answers: Any) -> Any:
    return list(answers) if isinstance(answers, tuple) else answers


def _problem(item: Predictions) -> str | None:
    """What is wrong with predictions, if anything."""
    for name in (item.system, item.dataset, item.language):
        if not is_name(name):
            return f"{name!r} is no name; use letters, digits and _ . + -"
    if item.metric not in MEASURES:
        return f"metric {item.metric!r} is none of {', '.join(MEASURES)}"
    if item.language_status not in (None, *STATUSES):
        return f"language_status {item.language_status!r} is none of {', '.join(STATUSES)}"
    least = 0 if item.language_status == "unknown" else 1
    lengths = {name: len(getattr(item, name)) for name in COLUMNS}
    if len(set(lengths.values())) > 1 or len(item.keys) < least:
        return ", ".join(f"{length} {name}" for name, length in lengths.items())
    if len(set(item.keys)) < len(item.keys):
        seen: set[str] = set()
        return f"key {next(key for key in item.keys if key in seen or seen.add(key))!r} comes twice"
    if item.metric == "exact_match_f1" or not len(item.keys):
        return None
    for name in ("labels", "predictions"):
        classes = np.asarray(getattr(item, name))
        outside = classes.dtype.kind not in "iu" or (classes < 0) | (classes >= item.num_classes)
        if np.any(outside):
            index = int(np.argmax(outside))
            where = f"{name} has {classes[index]} for key {item.keys[index]!r}"
            return f"{where}, not a class from 0 to {item.num_classes - 1}"
    return None


def _read(path: Path) -> Predictions:
    content, rows, columns = path.read_bytes(), [], {name: [] for name in FIELDS}
    lines = content.split(b"\n")[:-1]
    number = 1  # of the line that is at fault; 0: nobody can say
    try:
        for line in lines:
            number = len(rows) + 1
            rows.append(json.loads(line.decode()))
        number = 1
        if not rows:
            raise ValueError("it has no whole line")
        header, *rows_below = rows
        if header.pop("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} file")
        if (count := int(header.pop("rows"))) != len(rows_below):
            number = min(count, len(rows_below)) + 2
            raise ValueError(f"it has {len(rows_below)} rows, not {count}")
        for row in rows_below:
            number = len(columns[FIELDS[-1]]) + 2
            for name, column in columns.items():
                column.append(row[name])
        digest = header.pop("sha256", None)  # others' programs need not write it
        number = 0
        if digest is not None and _digest(content.decode().replace(digest, "", 1)) != digest:
            raise ValueError("its content is not what was written")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        where = f"{path}, line {number}" if number else str(path)
        said = f"no {error}" if isinstance(error, KeyError) else error
        fix = "evaluate again, or remove it"
        raise ValueError(f"{where}: damaged ({said}); {fix}") from error
    if unknown := set(header) - {field.name for field in fields(Predictions)}:
        raise ValueError(f"{path}, line 1: unknown field {min(unknown)!r}")
    is_text = header.get("metric") == "exact_match_f1"
    labels, answers = (
        columns[name] if is_text else np.array(columns[name]) for name in ("label", "prediction")
    )
    try:
        return Predictions(**header, keys=columns["key"], labels=labels, predictions=answers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
