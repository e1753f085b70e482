"""SIB-200: the topic of a FLORES-200 sentence, in 205 languages and scripts.

Read are the authors' `data/annotated/{code}/*.tsv`, the hub's `data/{code}/*.tsv`, and the Parquet
that it makes of these.
"""

from collections.abc import Iterator
from pathlib import Path

from mtllm_engine.data.rows import find, hub, quoted, read
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
    layouts = (f"data/annotated/{name}", f"annotated/{name}", f"data/{name}", name)
    for path in find(folder, *layouts, *hub(code, split)):
        for row in quoted(path, "\t") if path.suffix == ".tsv" else read(path):
            key = str(row.number("index_id", 0, 1 << 31))
            label = row.label("category", LABELS)
            yield Example(key=key, text=row.text("text"), label=label)


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
