"""`evaluate.languages`: a benchmark's own codes are ours by its own table, or are refused."""

import json
from pathlib import Path

import pytest

from mtllm_engine.config import Config
from mtllm_engine.evaluation.systems import find_tests
from mtllm_engine.tasks import find_dataset, load_task
from tests.support.tiny import build_config, build_decoder, build_encoder

PAIR = "a\tb\tneutral\n"
QUESTION = {"id": "1", "question": "or?", "answers": [{"text": "a", "answer_start": 0}]}
SQUAD = json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [QUESTION]}]}]})
FILES = {  # task, data set -> its file of a language, and what is in it, by the set's own code
    ("nli", "xnli"): ("xnli.test.tsv", "language\tsentence1\tsentence2\tgold_label\n{0}\t" + PAIR),
    ("nli", "americasnli"): ("test/{0}.tsv", "{0}\t" + PAIR),
    ("nli", "kardesnlu"): (
        "xnli.test.{0}.csv",
        "s1_translation,s2_translation,gold_label\na,b,neutral\n",
    ),
    ("nli", "indicxnli"): (
        "forward/test/xnli_{0}.json",
        '[{{"premise": "a", "hypothesis": "b", "label": 1}}]',
    ),
    ("pawsx", "pawsx"): ("{0}/test_2k.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n"),
    ("xquad", "xquad"): ("xquad.{0}.json", SQUAD.replace("{", "{{").replace("}", "}}")),
    ("nusax", "nusax"): ("{0}/test.csv", "id,text,label\n1,a,neutral\n"),
    ("sib200", "sib200"): ("{0}/test.tsv", "index_id\tcategory\ttext\n1\ttravel\ta\n"),
    ("belebele", "belebele"): (
        "{0}.jsonl",
        json.dumps({"flores_passage": "a", "question": "b", "correct_answer_num": "1"})[
            :-1
        ].replace("{", "{{")
        + "".join(f', "mc_answer{number}": "c"' for number in range(1, 5))
        + "}}\n",
    ),
}
OWN_CODES = [
    (*names, code)
    for names in FILES
    for code, ours in load_task(names[0]).datasets[names[1]].languages.items()
    if code != ours
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    return folder


def write(folder: Path, name: str, code: str) -> str:
    """A data set's file of one language; returns the test set."""
    path, content = next(value for (_, each), value in FILES.items() if each == name)
    path = folder / path.format(code)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content.format(code), encoding="utf-8")
    return f"{name}:{folder}"


def config(models: Path, task: str, tests: list[str], *languages: str) -> Config:
    return build_config(
        models,
        task={"name": task, "test": tests},
        evaluate={"systems": ["llm"], "languages": list(languages)},
        data={"train": []},
    )


def read_languages(configured: Config) -> list[str]:
    return [test.language for test in find_tests(configured)[1]]


@pytest.mark.parametrize(("task", "name", "code"), OWN_CODES)
def test_a_sets_own_code_is_the_language_that_the_set_means(
    models: Path, tmp_path: Path, task: str, name: str, code: str
):
    source = write(tmp_path, name, code)
    ours = find_dataset(load_task(task), source)[0].languages[code]
    for languages in ((code,), (ours,), (ours, code), ()):
        assert read_languages(config(models, task, [source], *languages)) == [ours]


def test_a_code_means_in_each_set_what_its_own_table_says(models: Path, tmp_path: Path):
    """Kardesnlu's Uyghur is in Cyrillic; XNLI has no Uyghur, and Swahili in both is one."""
    sources = [write(tmp_path / "k", "kardesnlu", "ug"), write(tmp_path / "x", "xnli", "sw")]
    assert read_languages(config(models, "nli", sources, "sw", "ug")) == ["uig_Cyrl", "swh_Latn"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("en", "eng_Latn"),
        ("EN", "eng_Latn"),
        ("swh_latn", "swh_Latn"),
        ("swh", "swh_Latn"),
        ("javanese", "jav_Latn"),
        ("swa_Latn", "swh_Latn"),
    ],
)
def test_another_code_is_refused_with_the_nearest_that_is_there(
    models: Path, tmp_path: Path, typed: str, meant: str
):
    for code in ("eng_Latn", "swh_Latn", "jav_Latn"):
        source = write(tmp_path, "sib200", code)
    with pytest.raises(ValueError) as error:
        read_languages(config(models, "sib200", [source], "eng_Latn", typed))
    message = f"evaluate.languages has {typed}, which is in no test set of {source}; "
    assert str(error.value).startswith(f"{message}did you mean {meant}, ")


def test_a_reader_takes_our_codes_alone(tmp_path: Path):
    write(tmp_path, "xnli", "en")
    dataset = load_task("nli").datasets["xnli"]
    for language in ("en", "../../x", "/x"):
        with pytest.raises(ValueError, match="xnli: .* is no code of ours for a language; did you"):
            dataset.has(tmp_path, "test", language)
    assert dataset.present(tmp_path, "test") == ["eng_Latn"]
