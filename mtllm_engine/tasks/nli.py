"""Natural language inference: MNLI to train on; XNLI and its kin in other languages to test with.

These are AmericasNLI, KardesNLU and IndicXNLI. Read are the authors' files, the hub's Parquet
(MNLI in `nyu-mll/glue` and `nyu-mll/multi_nli`, XNLI also in `google/xtreme`), and XTREME's
`xnli/{train,dev,test}-{code}.tsv`, whose test sets have no labels to be scored by. SICK is small,
simple and has English examples to train on: within reach of small models.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mtllm_engine.data.rows import Row, find, hub, numbered, read, read_json, xtreme
from mtllm_engine.languages import ENGLISH, flores_code
from mtllm_engine.tasks import Dataset, Example, Task, pairs

LABELS = ("entailment", "neutral", "contradiction")
COLUMNS = ("language", "premise", "hypothesis", "label")
THEIRS = ("sentence1", "sentence2", "gold_label")  # MNLI's and XNLI's authors call the columns
UNDECIDED = "-"  # the label of a pair that MNLI's readers did not agree about
AMERICAS_DATA = ("data/anli_final/", "")  # the folder in one of the two repositories
DEV = {"validation": "dev"}  # what most of these sets call it
# test_matched comes without labels.
MATCHED = {"validation": "validation_matched", "test": "test_matched"}


def _inferences(rows: Iterable[Row]) -> Iterator[Example]:
    return pairs(rows, "premise", "hypothesis", "label", LABELS)


def _theirs(rows: Iterable[Row]) -> Iterator[Example]:
    return pairs(rows, "sentence1", "sentence2", "gold_label", LABELS)


def _read_mnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """The hub's, the authors' `multinli_1.0_train.jsonl`, or what XTREME trains on."""
    if code != "en":
        return iter(())
    name = MATCHED.get(split, split)
    own = f"multinli_1.0_{name.replace('validation', 'dev')}.jsonl"
    layouts = [each for config in ("mnli", "data", "default", ".") for each in hub(config, name)]
    layouts += [f"multinli_1.0/{own}", own]
    if split == "train":  # XTREME's others are XNLI's
        layouts += ["xnli/train-en.tsv", "train-en.tsv"]
    paths = find(folder, *layouts)
    if paths[0].suffix == ".parquet":
        return _inferences(row for path in paths for row in read(path))
    rows = read(paths[0]) if paths[0].name == own else xtreme(paths[0], THEIRS)
    return _theirs(row for row in rows if row.value("gold_label") != UNDECIDED)


def _read_xnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """A file of one language, or of all (the authors', and one of the hub's), by its column."""
    name = DEV.get(split, split)
    names = [f"xnli.{name}.{kind}" for kind in ("tsv", "jsonl")]
    together = [f"{parent}{each}" for each in names for parent in ("XNLI-1.0/", "")]
    bare = f"{name}-{code}.tsv"
    paths = find(folder, *hub(code, split), *together, *hub("XNLI", split), f"xnli/{bare}", bare)
    if paths[0].name == bare:
        return _theirs(xtreme(paths[0], THEIRS))
    rows = (row for path in paths for row in read(path))
    if paths[0].relative_to(folder).parts[0] == code:
        return _inferences(rows)
    return _theirs(row for row in rows if row.value("language") == code)


def _read_americasnli(folder: Path, split: str, code: str) -> Iterator[Example]:
    """A repository's `test/{code}.tsv` (some have no header), its file of all, or the hub's two."""
    name = DEV.get(split, split)
    files = (f"{name}/{code}.tsv", f"{name}/anli.{name}.tsv", f"{name}.tsv")
    layouts = (f"{parent}{file}" for file in files for parent in AMERICAS_DATA)
    paths = find(folder, *layouts, *hub(code, split), *hub("all_languages", split))
    rows = (row for path in paths for row in read(path, COLUMNS, COLUMNS[1:]))
    if code in (paths[0].stem, paths[0].relative_to(folder).parts[0]):
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
    paths = find(folder, f"forward/{name}/xnli_{code}.json", *hub(code, split))
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


def _read_sick(folder: Path, split: str, code: str) -> Iterator[Example]:
    """SICK.txt, SICK_NL.txt, SICK_BR.txt and jsick.tsv, wherever they lie below the folder; a pair
    has one key in all of them."""
    file, side, of_split = SICK_FILES[code]
    first, second, label = (
        f"{column}{side}" for column in ("sentence_A", "sentence_B", "entailment_label")
    )
    path, *_ = find(folder, file, f"**/{file}")
    for row in read(path):
        if row.text(of_split).strip().lower() == SICK_SPLITS.get(split, split):
            (example,) = pairs([row], first, second, label, LABELS)
            yield replace(example, key=row.text("pair_ID"))


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
SICK_SPLITS = {"validation": "trial"}
SICK_FILES = {  # a file, what its columns' names end in, and which of them says the split
    "en": ("SICK.txt", "", "SemEval_set"),
    "nl": ("SICK_NL.txt", "", "SemEval_set"),
    "pt": ("SICK_BR.txt", "", "SemEval_set"),
    "ja": ("jsick.tsv", "_Ja", "data"),
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
        licence="CC0-1.0",
    ),
    Dataset(
        name="sick",
        languages={code: flores_code(code) for code in SICK_FILES},
        reader=_read_sick,
        licence="CC-BY-NC-SA-3.0; JSICK's CC-BY-4.0",
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
