"""NusaX: the sentiment of a text, in English, Indonesian and ten languages of Indonesia.

Read are the authors' `datasets/sentiment/{language}/*.csv` and the hub's Parquet in `{code}/`.
"""

from collections.abc import Iterator
from pathlib import Path

from mtllm_engine.data.rows import find, hub, read
from mtllm_engine.languages import ENGLISH
from mtllm_engine.tasks import Dataset, Example, Task

LABELS = ("negative", "neutral", "positive")
VALID = {"validation": "valid"}
LANGUAGES = {  # the repository's folders, then the hub's
    "acehnese": "ace_Latn",
    "balinese": "ban_Latn",
    "banjarese": "bjn_Latn",
    "buginese": "bug_Latn",
    "english": ENGLISH,
    "indonesian": "ind_Latn",
    "javanese": "jav_Latn",
    "madurese": "mad_Latn",
    "minangkabau": "min_Latn",
    "ngaju": "nij_Latn",
    "sundanese": "sun_Latn",
    "toba_batak": "bbc_Latn",
}
LANGUAGES |= {code[:3]: code for code in LANGUAGES.values()}


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    name = f"{code}/{VALID.get(split, split)}.csv"
    layouts = (f"datasets/sentiment/{name}", f"sentiment/{name}", name)
    paths = find(folder, *layouts, *hub(code, split))
    rows = (row for path in paths for row in read(path))
    for row in rows:
        key = str(row.number("id", 0, 1 << 31))  # the same sentence's in every language
        yield Example(key=key, text=row.text("text"), label=row.label("label", LABELS))


task = Task(
    name="nusax",
    head="classification",
    labels=LABELS,
    metric="macro_f1",
    datasets={
        "nusax": Dataset(name="nusax", languages=LANGUAGES, reader=_read, licence="CC-BY-SA-4.0")
    },
    train=("nusax", "train"),
    validation=("nusax", "validation"),
)
