"""A header is one that names the columns needed, however it does; files without one stay so."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.data.rows import read
from mtllm_engine.tasks import Example, load_task

ROWS = {
    "americasnli": [
        {"language": "aym", "premise": "Ha' \"e", "hypothesis": "Nda", "label": "neutral"},
        {"language": "aym", "premise": " ", "hypothesis": "Id", "label": "entailment"},
    ],
    "taxi1500": [
        {"id": "43001001", "label": "Faith", "text": "In the beginning"},
        {"id": "45001002", "label": "Grace", "text": "grace to you"},
    ],
}
READ = {"americasnli": ("nli", "ayr_Latn"), "taxi1500": ("taxi1500", "eng_Latn")}
PATHS = {
    "americasnli": ("test/aym.tsv", "data/anli_final/test/aym.tsv", "test.tsv"),
    "taxi1500": ("eng_data/eng_test.tsv", "eng_test.tsv"),
}
OTHER = {"idx": "25051", "Split": "test", "": "", "genre": "x y"}
NAMES = st.sampled_from([str.lower, str.upper, str.title, lambda name: f" {name} "])


def read_examples(folder: Path, name: str) -> list[Example]:
    task, language = READ[name]
    return list(load_task(task).datasets[name].read(folder, "test", language))


def write(path: Path, lines: list[list[str]], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + end for line in lines), newline="")


@pytest.mark.parametrize("name", ROWS)
@given(seed=st.integers(0, 1 << 30), spelled=NAMES, others=st.sets(st.sampled_from(list(OTHER))))
def test_a_header_names_columns_in_any_order_and_case_among_others(
    tmp_path_factory, name: str, seed: int, spelled, others: set[str]
):
    generator = random.Random(seed)
    folder = tmp_path_factory.mktemp("files")
    write(folder / "plain" / PATHS[name][0], [list(row.values()) for row in ROWS[name]])
    columns = [*ROWS[name][0], *sorted(others)]
    generator.shuffle(columns)
    header = [spelled(column) for column in columns]
    table = [[(row | OTHER)[column] for column in columns] for row in ROWS[name]]
    tabs = [generator.randint(0, 2) for _ in range(3)]  # behind the last column
    lines = [[*line, *[""] * count] for line, count in zip([header, *table], tabs)]
    if columns[-1] == "":
        lines = [header, *table]
    path = generator.choice(PATHS[name])
    write(folder / "headed" / path, lines, generator.choice(["\n", "\r\n"]))
    expected = read_examples(folder / "plain", name)
    assert read_examples(folder / "headed", name) == expected and len(expected) == 2


def test_a_file_of_one_language_need_not_name_it_and_names_no_other(tmp_path: Path):
    rows = ROWS["americasnli"]
    columns = ["premise", "hypothesis", "label"]
    write(tmp_path / "test" / "aym.tsv", [columns, *[[row[c] for c in columns] for row in rows]])
    assert [example.label for example in read_examples(tmp_path, "americasnli")] == [1, 0]
    spelled = [[*row.values()] for row in (rows[0] | {"language": "Aymara"}, rows[1])]
    write(tmp_path / "test" / "aym.tsv", spelled)
    assert [example.label for example in read_examples(tmp_path, "americasnli")] == [0]
    write(tmp_path / "test" / "aym.tsv", spelled[:1])
    with pytest.raises(ValueError, match=r"aym.tsv:1: column 'language' should be 'aym', not 'Aym"):
        read_examples(tmp_path, "americasnli")


def test_a_file_of_all_languages_must_name_them(tmp_path: Path):
    write(tmp_path / "test.tsv", [["premise", "hypothesis", "label"], ["a", "b", "neutral"]])
    with pytest.raises(ValueError, match=r"test.tsv:2: no column 'language' among 'premise', "):
        read_examples(tmp_path, "americasnli")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([["a", "b", "B", "B"]], r"t.tsv:1: two columns are called 'B'"),
        ([["a", "b"], ["1", "2", "3"]], r"t.tsv:2: 3 columns, not 2: a, b"),
        ([["a", "b", ""], ["1", "2", "3"]], r"t.tsv:2: 3 columns, not 2: a, b"),
        ([["a", "b"], ["1"]], r"t.tsv:2: 1 columns, not 2: a, b"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_named(tmp_path: Path, lines, message: str):
    write(tmp_path / "t.tsv", lines)
    with pytest.raises(ValueError, match=message):
        list(read(tmp_path / "t.tsv"))


def test_other_tables_may_spell_their_columns_otherwise_too(tmp_path: Path):
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "test.csv").write_text("Id,Label, TEXT ,\n7,neutral,a,\n")
    examples = load_task("nusax").datasets["nusax"].read(tmp_path, "test", "eng_Latn")
    assert [(each.key, each.text, each.label) for each in examples] == [("7", "a", 1)]
