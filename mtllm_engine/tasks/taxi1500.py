"""Taxi1500: the topic of a Bible verse, labelled in English; others get the same verse's label.

The verses come from the Bible editions of Taxi1500-c, one file each, named by ISO 639-3
(`swh-x-bible-...txt`). Of a language's editions in our code's script the one with most of the
split's verses is read, the first by name of equals.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mtllm_engine.data.rows import AbsentError, Row, find, read
from mtllm_engine.languages import ENGLISH, FLORES_200, OTHER_CODES, SCRIPTS
from mtllm_engine.tasks import Dataset, Example, Task

LABELS = ("Recommendation", "Faith", "Description", "Sin", "Grace", "Violence")
COLUMNS = ("id", "label", "text")
DEV = {"validation": "dev"}
UNICODE_SCRIPTS = {"CJK": {"Hans", "Hant", "Jpan"}, "HIRAGANA": {"Jpan"}, "KATAKANA": {"Jpan"}}
SAMPLE = 200  # letters that are looked at to know a script


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    name = f"eng_{DEV.get(split, split)}.tsv"
    path, *_ = find(folder, f"eng_data/{name}", name)
    labelled = {_verse(row): row for row in read(path, COLUMNS)}
    verses = None if code == ENGLISH else _best_edition(folder, code, labelled)
    for verse, row in labelled.items():
        text = row.text("text") if verses is None else verses.get(verse)
        if text:
            yield Example(key=verse, text=text, label=row.label("label", LABELS))


def _verse(row: Row) -> str:
    return str(row.number("id", 1, 99_999_999))


def _best_edition(folder: Path, code: str, labelled: Mapping[str, Row]) -> dict[str, str]:
    editions = [_verses(path, labelled) for path in _editions(folder, code)]
    fitting = [verses for verses in editions if verses and _is_script(code[4:], verses)]
    if not fitting:
        raise AbsentError(f"{folder} has no edition in {code} with verses of this split")
    return max(fitting, key=len)


def _editions(folder: Path, code: str) -> list[Path]:
    """Files of a language by ISO 639-3, and by the group that FLORES-200 takes it for."""
    groups = [other for other, ours in OTHER_CODES.items() if ours == code and len(other) == 3]
    editions = []
    for prefix in (code[:3], *groups):
        patterns = [f"{parent}{prefix}[-_]*.txt" for parent in ("Taxi1500-c*/", "")]
        try:
            editions += find(folder, *patterns)
        except AbsentError as error:
            reason = error
    if not editions:
        raise reason
    return editions


def _verses(path: Path, labelled: Mapping[str, Row]) -> dict[str, str]:
    """The labelled verses of an edition: lines of an id and a text, among others without an id."""
    verses = {}
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                number, _, text = line.strip().partition("\t")
                if number.lstrip("0") in labelled and text.strip():
                    verses[number.lstrip("0")] = text.strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    return verses


def _is_script(script: str, verses: Mapping[str, str]) -> bool:
    """Whether most letters are of a script, with whose name Unicode's names of them begin."""
    letters = [char for text in verses.values() for char in text if char.isalpha()][:SAMPLE]
    names = Counter(unicodedata.name(char, "").split(" ")[0] for char in letters)
    (most, _), *_ = names.most_common(1) or [("", 0)]
    if most in UNICODE_SCRIPTS:
        return script in UNICODE_SCRIPTS[most]
    return most == SCRIPTS.get(script, script).split(" ")[0].upper() or script not in SCRIPTS


TAXI1500 = Dataset(
    name="taxi1500",
    languages={code: code for code in FLORES_200},
    reader=_read,
    licence="labels Apache-2.0, each edition its own",
)
task = Task(
    name="taxi1500",
    head="classification",
    labels=LABELS,
    metric="macro_f1",
    datasets={"taxi1500": TAXI1500},
    train=("taxi1500", "train"),
    validation=("taxi1500", "validation"),
)
