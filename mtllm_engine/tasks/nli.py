"""Natural language inference: MNLI to train on; XNLI and its kin in other languages to test with.

These are AmericasNLI, KardesNLU and IndicXNLI.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mtllm_engine.data.rows import Row, find, numbered, read, read_json
from mtllm_engine.languages import ENGLISH, flores_code
from mtllm_engine.tasks import Dataset, Example, Task, pairs

LABELS = ("entailment", "neutral", "contradiction")
COLUMNS = ("language", "premise", "hypothesis", "label")
AMERICAS_DATA = ("data/anli_final/", "")  # the folder in one of the two repositories
DEV = {"validation": "dev"}  # what most of these sets call it
# test_matched comes without labels.
MATCHED = {"validation": "validation_matched", "test": "test_matched"}


def _inferences(rows: Iterable[Row]) -> Iterator[Example]:
    return pairs(rows, "premise", "hypothesis", "label", LABELS)


def _read_mnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    name = MATCHED.get(split, split)
    paths = find(folder, f"mnli/{name}-*.parquet", f"{name}-*.parquet") if code == "en" else ()
    return _inferences(row for path in paths for row in read(path))


def _read_xnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """The hub's `{code}/{split}-*.parquet`, or XNLI-1.0's file of all languages, by its column."""
    names = [f"xnli.{DEV.get(split, split)}.{kind}" for kind in ("tsv", "jsonl")]
    together = [f"{parent}{name}" for name in names for parent in ("XNLI-1.0/", "")]
    paths = find(folder, f"{code}/{split}-*.parquet", *together)
    rows = (row for path in paths for row in read(path))
    if paths[0].suffix == ".parquet":
        return _inferences(rows)
    mine = (row for row in rows if row.value("language") == code)
    return pairs(mine, "sentence1", "sentence2", "gold_label", LABELS)


def _read_americasnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """A repository's `test/{code}.tsv` (some have no header), its file of all, or the hub's."""
    name = DEV.get(split, split)
    files = (f"{name}/{code}.tsv", f"{name}/anli.{name}.tsv", f"{name}.tsv")
    layouts = (f"{parent}{file}" for file in files for parent in AMERICAS_DATA)
    paths = find(folder, *layouts, f"{code}/{split}-*.parquet")
    rows = (row for path in paths for row in read(path, COLUMNS, COLUMNS[1:]))
    if paths[0].stem == code or paths[0].parent.name == code:
        return _inferences(_own_rows(rows, code))
    return _inferences(row for row in rows if row.value("language") == code)


def _own_rows(rows: Iterable[Row], code: str) -> Iterator[Row]:
    """The rows of one language's file, which need not say so.

    Raises:
        ValueError: All say that they are in another.
    """
    others, is_empty = None, True
    for row in rows:
        if not row.has("language") or row.value("language") == code:
            is_empty = False
            yield row
        others = others or row
    if is_empty and others:
        raise others.wrong("language", repr(code))


def _read_kardesnlu(folder: Path, split: str, code: str) -> Iterator[Example]:
    """The translated columns: others are English, and the first one numbers XNLI's rows."""
    name = f"xnli.{DEV.get(split, split)}.{code}.csv"
    path, *_ = find(folder, f"Data/*/{name}", f"*/{name}", name)
    return pairs(read(path), "s1_translation", "s2_translation", "gold_label", LABELS)


def _read_indicxnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """`forward/dev/xnli_{code}.json`, the rows under the split's name, or the hub's Parquet."""
    name = DEV.get(split, split)
    paths = find(folder, f"forward/{name}/xnli_{code}.json", f"{code}/{split}/*.parquet")
    if paths[0].suffix == ".parquet":
        return _inferences(row for path in paths for row in read(path))
    return _inferences(_rows_in_json(paths[0]))


def _rows_in_json(path: Path) -> Iterator[Row]:
    content = read_json(path)
    has_name = isinstance(content, dict) and len(content) == 1
    rows = next(iter(content.values())) if has_name else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: should be an object with a list of rows under the split's name")
    return numbered(path, rows)


XNLI = "ar bg de el en es fr hi ru sw th tr ur vi zh"
INDICXNLI = "as bn gu hi kn ml mr or pa ta te"
AMERICASNLI = {
    "aym": "ayr_Latn",
    "bzd": "bzd_Latn",
    "cni": "cni_Latn",
    "gn": "grn_Latn",
    "hch": "hch_Latn",
    "nah": "nah_Latn",
    "oto": "oto_Latn",
    "quy": "quy_Latn",
    "shp": "shp_Latn",
    "tar": "tar_Latn",
}
KARDESNLU = {
    "az": "azj_Latn",
    "kk": "kaz_Cyrl",
    "ky": "kir_Cyrl",
    "ug": "uig_Cyrl",  # FLORES has Uyghur in the Arabic script only
    "uz": "uzn_Latn",
}
DATASETS = (
    Dataset(name="mnli", languages={"en": ENGLISH}, reader=_read_mnli, licence="OANC and others"),
    Dataset(
        name="xnli",
        languages={code: flores_code(code) for code in XNLI.split()},
        reader=_read_xnli,
        licence="CC-BY-NC-4.0",
    ),
    Dataset(
        name="americasnli", languages=AMERICASNLI, reader=_read_americasnli, licence="CC-BY-SA-4.0"
    ),
    Dataset(name="kardesnlu", languages=KARDESNLU, reader=_read_kardesnlu, licence="unknown"),
    Dataset(
        name="indicxnli",
        languages={code: flores_code(code) for code in INDICXNLI.split()},
        reader=_read_indicxnli,
        licence="unknown",
    ),
)
task = Task(
    name="nli",
    head="classification",
    labels=LABELS,
    metric="accuracy",
    datasets={dataset.name: dataset for dataset in DATASETS},
    train=("mnli", "train"),
    validation=("xnli", "validation"),
)
