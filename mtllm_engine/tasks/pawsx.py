"""PAWS-X: whether two sentences of nearly the same words say the same.

Read are the authors' `x-final/{code}/*.tsv`, the hub's Parquet (in `{code}/`, or XTREME's in
`PAWS-X.{code}/`), and XTREME's `pawsx/{train,dev,test}-{code}.tsv`, whose test sets have no labels
to be scored by.
"""

from collections.abc import Iterator
from pathlib import Path

from mtllm_engine.data.rows import find, hub, read, xtreme
from mtllm_engine.languages import flores_code
from mtllm_engine.tasks import Dataset, Example, Task, pairs

LABELS = ("different", "paraphrase")
FILES = {"train": "translated_train.tsv", "validation": "dev_2k.tsv", "test": "test_2k.tsv"}
SENTENCES = ("sentence1", "sentence2")
COLUMNS = (*SENTENCES, "label")
DEV = {"validation": "dev"}  # what XTREME calls it
UNTRANSLATED = {"NS", ""}  # stand in either column for a sentence that the translators left out


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    """Without the rows that lack a translation: `NS`, or (`translated_train`) nothing at all."""
    name = "train.tsv" if (code, split) == ("en", "train") else FILES[split]
    bare = f"{DEV.get(split, split)}-{code}.tsv"
    layouts = (f"x-final/{code}/{name}", f"{code}/{name}", f"pawsx/{bare}", bare)
    paths = find(folder, *layouts, *hub(code, split), *hub(f"PAWS-X.{code}", split))
    is_bare = paths[0].name == bare
    rows = (row for path in paths for row in (xtreme(path, COLUMNS) if is_bare else read(path)))
    translated = (row for row in rows if not {*map(row.value, SENTENCES)} & UNTRANSLATED)
    return pairs(translated, *SENTENCES, "label", LABELS)


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
