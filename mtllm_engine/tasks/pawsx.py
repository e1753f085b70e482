"""PAWS-X: whether two sentences of nearly the same words say the same."""

from collections.abc import Iterator
from pathlib import Path

from mtllm_engine.data.rows import find, read
from mtllm_engine.languages import flores_code
from mtllm_engine.tasks import Dataset, Example, Task, pairs

LABELS = ("different", "paraphrase")
FILES = {"train": "translated_train.tsv", "validation": "dev_2k.tsv", "test": "test_2k.tsv"}
UNTRANSLATED = ("NS", "")  # stand in either column for a sentence that the translators left out


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    """Without the rows that lack a translation: `NS`, or (`translated_train`) nothing at all."""
    name = "train.tsv" if (code, split) == ("en", "train") else FILES[split]
    path, *_ = find(folder, f"x-final/{code}/{name}", f"{code}/{name}")
    names = ("sentence1", "sentence2")
    rows = (row for row in read(path) if not {*map(row.value, names)}.intersection(UNTRANSLATED))
    return pairs(rows, *names, "label", LABELS)


CODES = "de en es fr ja ko zh"
PAWSX = Dataset(
    name="pawsx",
    languages={code: flores_code(code) for code in CODES.split()},
    reader=_read,
    licence="free for any purpose, Google LLC acknowledged",
)
task = Task(
    name="pawsx",
    head="classification",
    labels=LABELS,
    metric="accuracy",
    datasets={"pawsx": PAWSX},
    train=("pawsx", "train"),
    validation=("pawsx", "validation"),
)
