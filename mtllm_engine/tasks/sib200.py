"""SIB-200: the topic of a FLORES-200 sentence, in 205 languages and scripts."""

from collections.abc import Iterator
from pathlib import Path

from mtllm_engine.data.rows import find, quoted
from mtllm_engine.languages import FLORES_200
from mtllm_engine.tasks import Dataset, Example, Task

LABELS = (
    "science/technology",
    "travel",
    "politics",
    "sports",
    "health",
    "entertainment",
    "geography",
)
DEV = {"validation": "dev"}


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    """Texts with a quote in them are quoted, and the quote doubled."""
    name = f"{code}/{DEV.get(split, split)}.tsv"
    path, *_ = find(folder, f"data/annotated/{name}", f"annotated/{name}", name)
    for row in quoted(path, "\t"):
        yield Example(
            key=row.text("index_id"), text=row.text("text"), label=row.label("category", LABELS)
        )


SIB200 = Dataset(
    name="sib200",
    languages={code: code for code in (*FLORES_200, "nqo_Nkoo")},
    reader=_read,
    licence="CC-BY-SA-4.0",
)
task = Task(
    name="sib200",
    head="classification",
    labels=LABELS,
    metric="accuracy",
    datasets={"sib200": SIB200},
    train=("sib200", "train"),
    validation=("sib200", "validation"),
)
