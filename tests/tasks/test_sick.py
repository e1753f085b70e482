"""SICK and its translations, each in its authors' own table."""

from pathlib import Path

import pytest

from mtllm_engine.data.rows import AbsentError
from mtllm_engine.tasks import load_task

SICK = load_task("nli").datasets["sick"]
PAIRS = [("1", 'A "kid" plays', "A boy", "NEUTRAL", "TRAIN"), ("4", "B", "b", "ENTAILMENT", "TEST")]
PAIRS += [("5", "C", "c", "CONTRADICTION", "TRIAL"), ("6", "D", "d", "CONTRADICTION", "TEST")]
HEADER = [
    "pair_ID",
    "sentence_A",
    "sentence_B",
    "entailment_label",
    "relatedness_score",
    "SemEval_set",
]
JAPANESE = [
    "pair_ID",
    "data",
    "sentence_A_En",
    "entailment_label_En",
    "sentence_A_Ja",
    "sentence_B_Ja",
]


def write(path: Path, lines: list[list[str]], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + end for line in lines), "utf-8", newline="")


def write_sick(path: Path, end: str = "\n", bom: str = "") -> None:
    header = [bom + HEADER[0], *HEADER[1:]]
    write(path, [header, *([*row[:4], "4.5", row[4]] for row in PAIRS)], end)


def examples(folder: Path, split: str, language: str) -> list[tuple[str, str, int]]:
    return [(each.key, each.text, each.label) for each in SICK.read(folder, split, language)]


@pytest.mark.parametrize(
    ("language", "path", "end", "bom"),
    [
        ("eng_Latn", "SICK.txt", "\r\n", ""),
        ("nld_Latn", "sick_nl/data/tasks/sick_nl/SICK_NL.txt", "\n", ""),
        ("por_Latn", "SICK-BR/SICK_BR.txt", "\n", "\ufeff"),
    ],
)
def test_splits_are_semevals(tmp_path: Path, language: str, path: str, end: str, bom: str):
    write_sick(tmp_path / path, end, bom)
    assert examples(tmp_path, "train", language) == [("1", 'A "kid" plays\nA boy', 1)]
    assert examples(tmp_path, "validation", language) == [("5", "C\nc", 2)]
    assert examples(tmp_path, "test", language) == [("4", "B\nb", 0), ("6", "D\nd", 2)]
    assert SICK.present(tmp_path, "test") == [language]
    with pytest.raises(AbsentError, match="has no jsick.tsv"):
        examples(tmp_path, "test", "jpn_Jpan")


def test_japanese_pairs_have_labels_of_their_own(tmp_path: Path):
    row = ["6", "test", "There is no boy", "neutral", "戸外", "庭", "contradiction"]
    trial = ["7", "trial", "A", "neutral", "ア", "イ", "entailment"]
    write(tmp_path / "jsick" / "jsick.tsv", [[*JAPANESE, "entailment_label_Ja"], row, trial])
    assert examples(tmp_path, "test", "jpn_Jpan") == [("6", "戸外\n庭", 2)]
    assert examples(tmp_path, "validation", "jpn_Jpan") == [("7", "ア\nイ", 0)]
