"""XQuAD: the answer to a question, as a piece of the passage; SQuAD 1.1 to train on.

The text is the question, a newline, and the passage. The passage is the example's one span, and
what may be shortened. Read are the authors' `xquad.{code}.json` and `train-v1.1.json` (or in the
folders of these names that XTREME makes, whose test sets have no answers to be scored by), and the
hub's Parquet: `xquad.{code}/`, `plain_text/`, XTREME's `XQuAD.{code}/` and `SQuAD/`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtllm_engine.data.rows import Row, find, hub, numbered, read, read_json
from mtllm_engine.languages import ENGLISH, flores_code
from mtllm_engine.tasks import SEPARATOR, Dataset, Example, Task

SQUAD_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}


def _read_xquad(folder: Path, split: str, code: str) -> Iterator[Example]:
    if split == "test":  # which the hub calls validation
        name = f"xquad.{code}"
        layouts = (*hub(name, "validation"), *hub(f"XQuAD.{code}", "validation"))
        yield from _read_layouts(folder, f"{name}.json", f"xquad/{name}.json", *layouts)


def _read_squad(folder: Path, split: str, code: str) -> Iterator[Example]:
    if code == "en" and split in SQUAD_FILES:
        layouts = (*hub("plain_text", split), *hub("SQuAD", split))
        name = SQUAD_FILES[split]
        yield from _read_layouts(folder, name, f"squad/{name}", *layouts)


def _read_layouts(folder: Path, *layouts: str) -> Iterator[Example]:
    for path in find(folder, *layouts):
        yield from _questions(path) if path.suffix == ".json" else map(_flat_example, read(path))


def _questions(path: Path) -> Iterator[Example]:
    """SQuAD 1.1: data[].paragraphs[].qas[].answers[]."""
    content = read_json(path)
    root = Row(str(path), content if isinstance(content, dict) else {})
    for article in _children(root, "data", "article"):
        for paragraph in _children(article, "paragraphs", "paragraph"):
            for question in _children(paragraph, "qas", "question"):
                yield _example(question, paragraph.text("context"))


def _children(parent: Row, column: str, name: str) -> Iterator[Row]:
    items: Any = parent.value(column)
    if not isinstance(items, list):
        raise parent.wrong(column, "a list")
    return numbered(parent.where, items, name)


def compose(key: str, question: str, passage: str) -> Example:
    """One text of question and passage; what is too long is shortened in the passage."""
    text = f"{question}{SEPARATOR}{passage}"
    span = (len(text) - len(passage), len(text))
    return Example(key=key, text=text, spans=(span,), cut=span)


def _example(row: Row, passage: str) -> Example:
    example = compose(row.text("id"), row.text("question"), passage)
    ((start, _),) = example.spans
    answers = dict.fromkeys(
        _answer(answer, example.text, start)
        for answer in _children(row, "answers", "answer")
        if answer.value("text") != ""  # which stands where XTREME hides it
    )
    return replace(example, answers=tuple(answers))


def _flat_example(row: Row) -> Example:
    """A row of the hub's, whose answers are two lists, their texts and their starts."""
    answers = row.value("answers")
    columns = ("text", "answer_start")
    try:
        values = zip(*(answers[name] for name in columns), strict=True)
        listed = [dict(zip(columns, each)) for each in values]
    except (KeyError, TypeError, ValueError):
        raise row.wrong("answers", "lists of text and answer_start, of one length") from None
    return _example(row._replace(values={**row.values, "answers": listed}), row.text("context"))


def _answer(row: Row, text: str, start: int) -> tuple[int, int]:
    answer = row.text("text")
    first = start + row.number("answer_start", 0, len(text))
    if not text.startswith(answer, first):
        raise row.wrong("answer_start", f"where the passage has {answer[:40]!r}")
    return first, first + len(answer)


CODES = "ar de el en es hi ro ru th tr vi zh"
XQUAD = Dataset(
    name="xquad",
    languages={code: flores_code(code) for code in CODES.split()},
    reader=_read_xquad,
    licence="CC-BY-SA-4.0",
)
SQUAD = Dataset(name="squad", languages={"en": ENGLISH}, reader=_read_squad, licence="CC-BY-SA-4.0")
task = Task(
    name="xquad",
    head="span",
    metric="exact_match_f1",
    datasets={"xquad": XQUAD, "squad": SQUAD},
    train=("squad", "train"),
    validation=("squad", "validation"),
)
