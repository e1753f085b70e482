"""The same examples come from every layout that a set is published in: the authors', the hub's
repository's, that of the Parquet that the hub makes of one, and XTREME's.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from mtllm_engine.data.rows import AbsentError
from mtllm_engine.tasks import Dataset, Example, load_task, task_names

Rows = list[dict[str, Any]]
SENTENCES = [('Er sagt "ja.', "Ja,\u2028sagt er"), ("vier 'so'", 'fünf "'), ("6", "sieben")]
NLI_LABELS = ("entailment", "neutral", "contradiction")
PASSAGE, QUESTION = 'Ein "Satz" über 😀 Köln.', "Worüber?"
ANSWERS = [("Köln", 18), ("über 😀 Köln", 11)]
FORMS = (  # of a split: a repository's own, then what the hub makes of it, now and formerly
    ("{}-00000-of-00002.parquet", "{}-00001-of-00002.parquet"),
    ("{}/0000.parquet", "{}/0001.parquet"),
    ("set-{}.parquet",),
    ("set-{}-00000-of-00002.parquet", "set-{}-00001-of-00002.parquet"),
)


def dataset(name: str) -> Dataset:
    datasets = [each for task in task_names() for each in load_task(task).datasets.values()]
    return next(each for each in datasets if each.name == name)


def read(name: str, folder: Path, split: str, language: str) -> list[Example]:
    return list(dataset(name).read(folder, split, language))


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")


def write_plain(path: Path, rows: Rows) -> None:
    """A quote is a character."""
    lines = [[*rows[0]], *(map(str, row.values()) for row in rows)]
    write(path, "".join("\t".join(line) + "\n" for line in lines))


def write_quoted(path: Path, lines: list[list[Any]], delimiter: str, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(lines)


def write_headed(path: Path, rows: Rows, delimiter: str) -> None:
    """As pandas does."""
    write_quoted(path, [[*rows[0]], *([*row.values()] for row in rows)], delimiter)


def write_xtreme(path: Path, lines: list[tuple[Any, ...]]) -> None:
    """As XTREME's script does."""
    write_quoted(path, [[*line] for line in lines], "\t", "\r\n")


def write_json(path: Path, *values: Any) -> None:
    write(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_hub(folder: Path, form: tuple[str, ...], split: str, rows: Rows) -> None:
    """The first row in the first file, the others in the other, if there are two."""
    shares = [rows] if len(form) == 1 else [rows[:1], rows[1:]]
    for file, share in zip(form, shares, strict=True):
        path = folder / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(share), path)


def pairs(first: str, second: str, label: str, labels: list[Any]) -> Rows:
    return [{first: one, second: two, label: each} for (one, two), each in zip(SENTENCES, labels)]


def asked(answers: list[tuple[str, int]]) -> Rows:
    """Rows of the hub's, answers in columns."""
    columns = {"text": [text for text, _ in answers], "answer_start": [n for _, n in answers]}
    about = {"title": "A", "context": PASSAGE, "question": QUESTION, "answers": columns}
    return [{"id": key} | about for key in ("one", "two")]


def squad(rows: Rows) -> dict[str, Any]:
    questions = [
        {"id": row["id"], "question": row["question"], "answers": listed}
        for row in rows
        for listed in [[dict(zip(row["answers"], each)) for each in zip(*row["answers"].values())]]
    ]
    paragraphs = [{"context": PASSAGE, "qas": questions}]
    return {"data": [{"title": "A", "paragraphs": paragraphs}], "version": "1.1"}


def write_mnli(folder: Path, rows: Rows) -> None:
    theirs = [
        {"gold_label": NLI_LABELS[row["label"]], "sentence1": row["premise"], "pairID": "1n"}
        | {"sentence2": row["hypothesis"]}
        for row in rows
    ]
    theirs.insert(1, theirs[0] | {"gold_label": "-"})
    write_json(folder / "multinli_1.0" / "multinli_1.0_train.jsonl", *theirs)


def write_xnli(folder: Path, rows: Rows) -> None:
    theirs = [
        {"language": "de", "gold_label": NLI_LABELS[row["label"]], "sentence1": row["premise"]}
        | {"sentence2": row["hypothesis"]}
        for row in rows
    ]
    theirs.insert(0, theirs[1] | {"language": "ar"})
    write_plain(folder / "XNLI-1.0" / "xnli.dev.tsv", theirs)


class Published(NamedTuple):
    """A split as the hub has it, and how the authors write its rows."""

    split: str
    language: str
    configs: tuple[str, ...]
    hub_split: str
    rows: Rows
    write_own: Callable[[Path, Rows], None]


INFERENCES = pairs("premise", "hypothesis", "label", [0, 2, 1])
PUBLISHED = {
    "pawsx": Published(
        "test",
        "deu_Latn",
        ("de", "PAWS-X.de"),
        "test",
        pairs("sentence1", "sentence2", "label", [1, 0, 1]),
        lambda folder, rows: write_plain(folder / "x-final" / "de" / "test_2k.tsv", rows),
    ),
    "mnli": Published(
        "train", "eng_Latn", ("mnli", "data", "default", "."), "train", INFERENCES, write_mnli
    ),
    "xnli": Published("validation", "deu_Latn", ("de",), "validation", INFERENCES, write_xnli),
    "americasnli": Published(
        "validation",
        "grn_Latn",
        ("gn", "all_languages"),
        "validation",
        [{"language": "gn"} | row for row in INFERENCES],
        lambda folder, rows: write_plain(
            folder / "dev" / "gn.tsv",
            [row | {"label": NLI_LABELS[row["label"]]} for row in rows],
        ),
    ),
    "indicxnli": Published(
        "test",
        "hin_Deva",
        ("hi",),
        "test",
        INFERENCES,
        lambda folder, rows: write_json(folder / "forward/test/xnli_hi.json", {"test": rows}),
    ),
    "nusax": Published(
        "validation",
        "nij_Latn",
        ("nij",),
        "validation",
        [{"id": f"{7 - n}", "text": SENTENCES[n][0], "label": n} for n in range(3)],
        lambda folder, rows: write_headed(
            folder / "datasets" / "sentiment" / "ngaju" / "valid.csv", rows, ","
        ),
    ),
    "sib200": Published(
        "validation",
        "nqo_Nkoo",
        ("nqo_Nkoo",),
        "validation",
        [
            {"index_id": n, "category": label, "text": SENTENCES[n][0]}
            for n, label in enumerate(["politics", "geography", "science/technology"])
        ],
        lambda folder, rows: write_headed(
            folder / "data" / "annotated" / "nqo_Nkoo" / "dev.tsv", rows, "\t"
        ),
    ),
    "belebele": Published(
        "test",
        "swh_Latn",
        ("swh_Latn",),
        "test",
        [
            {"flores_passage": PASSAGE, "question": QUESTION, "correct_answer_num": f"{n}"}
            | {f"mc_answer{choice}": f"{choice * n}" for choice in range(1, 5)}
            for n in (3, 1)
        ],
        lambda folder, rows: write_json(folder / "data" / "swh_Latn.jsonl", *rows),
    ),
    "xquad": Published(
        "test",
        "deu_Latn",
        ("xquad.de", "XQuAD.de"),
        "validation",
        asked(ANSWERS),
        lambda folder, rows: write_json(folder / "xquad.de.json", squad(rows)),
    ),
    "squad": Published(
        "validation",
        "eng_Latn",
        ("plain_text", "SQuAD"),
        "validation",
        asked(ANSWERS),
        lambda folder, rows: write_json(folder / "dev-v1.1.json", squad(rows)),
    ),
}
ON_THE_HUB = [(name, config) for name, each in PUBLISHED.items() for config in each.configs]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize(("name", "config"), ON_THE_HUB)
def test_the_hubs_files_hold_the_authors_examples(tmp_path: Path, name: str, config: str, form):
    set_ = PUBLISHED[name]
    set_.write_own(tmp_path / "own", set_.rows)
    write_hub(tmp_path / "hub" / config, form, set_.hub_split, set_.rows)
    for other in {"train", "validation", "test"} - {set_.hub_split}:  # which are not read for it
        write_hub(tmp_path / "hub" / config, form, other, [{"other": 1}] * 2)
    expected = read(name, tmp_path / "own", set_.split, set_.language)
    assert read(name, tmp_path / "hub", set_.split, set_.language) == expected
    assert len(expected) == len(set_.rows)
    assert dataset(name).present(tmp_path / "hub", set_.split) == [set_.language]


def test_mnlis_matched_sets_are_the_validation_and_test_sets(tmp_path: Path):
    rows = PUBLISHED["mnli"].rows
    for split, ours in (("validation_matched", "validation"), ("test_matched", "test")):
        write_hub(tmp_path / "mnli", FORMS[1], split, rows)
        write_hub(tmp_path / "mnli", FORMS[1], split.replace("matched", "mismatched"), rows[:2])
        assert len(read("mnli", tmp_path, ours, "eng_Latn")) == len(rows)


@pytest.mark.parametrize("parent", ["data/annotated", "annotated", "data", "."])
def test_sib200_in_the_authors_folder_and_in_the_hubs(tmp_path: Path, parent: str):
    set_ = PUBLISHED["sib200"]
    write_headed(tmp_path / parent / "nqo_Nkoo" / "dev.tsv", set_.rows, "\t")
    examples = read("sib200", tmp_path, "validation", "nqo_Nkoo")
    assert [each.text for each in examples] == [row["text"] for row in set_.rows]
    assert [(each.key, each.label) for each in examples] == [("0", 2), ("1", 6), ("2", 0)]
    assert dataset("sib200").present(tmp_path, "validation") == ["nqo_Nkoo"]


def test_xnli_of_the_hubs_xtreme_is_in_one_file(tmp_path: Path):
    set_ = PUBLISHED["xnli"]
    set_.write_own(tmp_path / "own", set_.rows)
    theirs = pairs("sentence1", "sentence2", "gold_label", [NLI_LABELS[n] for n in (0, 2, 1)])
    rows = [{"language": code} | row for row in theirs for code in ("ar", "de")]
    write_hub(tmp_path / "hub" / "XNLI", FORMS[0], "validation", rows)
    expected = read("xnli", tmp_path / "own", "validation", "deu_Latn")
    assert read("xnli", tmp_path / "hub", "validation", "deu_Latn") == expected
    assert dataset("xnli").present(tmp_path / "hub", "validation") == ["arb_Arab", "deu_Latn"]


XTREME = {  # set -> its folder, a language, and labels as written
    "pawsx": ("pawsx", "de", "deu_Latn", [1, 0, 1]),
    "xnli": ("xnli", "sw", "swh_Latn", [NLI_LABELS[n] for n in (0, 2, 1)]),
}
NAMES = {"train": "train", "validation": "dev", "test": "test"}


@pytest.mark.parametrize("is_above", [True, False])
@pytest.mark.parametrize("split", NAMES)
@pytest.mark.parametrize("name", XTREME)
def test_xtremes_tables_have_no_header(tmp_path: Path, name: str, split: str, is_above: bool):
    folder, code, language, labels = XTREME[name]
    lines = [(*sentences, label) for sentences, label in zip(SENTENCES, labels, strict=True)]
    write_xtreme(tmp_path / folder / f"{NAMES[split]}-{code}.tsv", lines)
    examples = read(name, tmp_path if is_above else tmp_path / folder, split, language)
    assert [each.text for each in examples] == ["\n".join(pair) for pair in SENTENCES]
    expected = [label if name == "pawsx" else NLI_LABELS.index(label) for label in labels]
    assert [each.label for each in examples] == expected
    assert dataset(name).present(tmp_path, split) == [language]


@pytest.mark.parametrize("name", XTREME)
def test_xtremes_test_sets_have_no_labels(tmp_path: Path, name: str):
    folder, code, language, _ = XTREME[name]
    write_xtreme(tmp_path / folder / f"test-{code}.tsv", SENTENCES)
    examples = read(name, tmp_path, "test", language)
    assert [each.text for each in examples] == ["\n".join(pair) for pair in SENTENCES]
    assert {each.label for each in examples} == {-1}


def test_sentences_that_nobody_translated_are_left_out_of_xtremes_too(tmp_path: Path):
    write_xtreme(tmp_path / "test-ja.tsv", [("NS", "b", 1), ("a", "b", 0), ("a", "NS", 1)])
    (example,) = read("pawsx", tmp_path, "test", "jpn_Jpan")
    assert (example.text, example.label) == ("a\nb", 0)


def test_xtreme_trains_on_mnli(tmp_path: Path):
    lines = [(*SENTENCES[0], "entailment"), (*SENTENCES[1], "neutral")]
    write_xtreme(tmp_path / "xnli" / "train-en.tsv", lines)
    write_xtreme(tmp_path / "xnli" / "dev-en.tsv", lines)
    for folder in (tmp_path, tmp_path / "xnli"):
        assert [each.label for each in read("mnli", folder, "train", "eng_Latn")] == [0, 1]
        with pytest.raises(AbsentError, match="mnli has no|has no mnli"):
            read("mnli", folder, "validation", "eng_Latn")


def test_questions_in_xtremes_folder_and_those_whose_answers_it_took_out(tmp_path: Path):
    write_json(tmp_path / "squad" / "train-v1.1.json", squad(asked(ANSWERS)))
    write_json(tmp_path / "xquad" / "xquad.el.json", squad(asked([("", 0)])))
    first, _ = read("squad", tmp_path, "train", "eng_Latn")
    assert [first.text[slice(*each)] for each in first.answers] == [text for text, _ in ANSWERS]
    hidden = read("xquad", tmp_path, "test", "ell_Grek")
    assert [(each.text, each.answers) for each in hidden] == [(first.text, ())] * 2


@pytest.mark.parametrize("line", [("a",), ("a", "b", "1", "c")])
def test_a_row_of_xtremes_that_does_not_fit_is_named(tmp_path: Path, line: tuple[str, ...]):
    write_xtreme(tmp_path / "test-de.tsv", [("a", "b", "1"), (), line])
    count = f"{len(line)} columns, not 3: sentence1, sentence2, label"
    with pytest.raises(ValueError, match=rf"test-de\.tsv:3: {count}"):
        read("pawsx", tmp_path, "test", "deu_Latn")


@pytest.mark.parametrize(
    "answers", [{"text": ["a"], "answer_start": []}, {"text": ["a"]}, [{"text": "a"}], None, 7]
)
def test_answers_of_the_hubs_that_are_no_two_lists_are_named(tmp_path: Path, answers: Any):
    rows = [row | {"answers": answers} for row in asked(ANSWERS)]
    write_hub(tmp_path / "plain_text", FORMS[2], "train", rows)
    message = r"set-train\.parquet, row 1: column 'answers' should be lists of text and answer_st"
    with pytest.raises(ValueError, match=message) as error:
        read("squad", tmp_path, "train", "eng_Latn")
    assert "\n" not in str(error.value)
