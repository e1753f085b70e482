"""Every reader on small files in exactly the published layouts, and what is wrong with a file."""

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.data.rows import AbsentError
from mtllm_engine.data.shards import Corpus
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.languages import FLORES_200, is_well_formed
from mtllm_engine.tasks import SPLITS, Example, load_task, pack, pack_split, task_names
from mtllm_engine.tasks.belebele import compose
from tests.support.tiny import build_decoder, build_encoder

BOM = "\ufeff"
QUESTION = '{"id": "1", "question": "b", "answers": []}'
SQUAD = f'{{"data": [{{"paragraphs": [{{"context": "a", "qas": [{QUESTION}]}}]}}]}}'
NEEDED = {  # task -> data sets, number of languages
    "belebele": {"belebele": 122, "belebele_training": 1},
    "nli": {"mnli": 1, "xnli": 15, "americasnli": 10, "kardesnlu": 5, "indicxnli": 11, "sick": 4},
    "nusax": {"nusax": 12},
    "pawsx": {"pawsx": 7},
    "sib200": {"sib200": 205},
    "taxi1500": {"taxi1500": 204},
    "xquad": {"xquad": 12, "squad": 1},
}
HEADS = {  # task -> kind of head, number of outputs
    "belebele": ("choice", 4),
    "nli": ("classification", 3),
    "nusax": ("classification", 3),
    "pawsx": ("classification", 2),
    "sib200": ("classification", 7),
    "taxi1500": ("classification", 6),
    "xquad": ("span", 2),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def table(*rows, delimiter=","):
    """Rows as pandas writes them."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return out.getvalue()


def dataset(name):
    datasets = [each for task in task_names() for each in load_task(task).datasets.values()]
    return next(each for each in datasets if each.name == name)


def read(name, folder, split="test", language="eng_Latn"):
    return list(dataset(name).read(folder, split, language))


def inferences(examples):
    """Premise, hypothesis and label of each; what may be shortened is the premise."""
    assert all(
        example.cut == (0, example.text.index("\n")) and not example.spans for example in examples
    )
    return [(*example.text.split("\n"), example.label) for example in examples]


@pytest.mark.parametrize("name", NEEDED)
def test_tasks_are_consistent(name):
    task = load_task(name)
    assert task.name == name
    num_languages = {key: len(set(each.languages.values())) for key, each in task.datasets.items()}
    assert num_languages == NEEDED[name]
    assert (task.head == "choice") == (task.num_choices > 0)
    assert (task.head == "classification") == bool(task.labels)
    assert task.head_size == HEADS[name]
    for data, split in (task.train, task.validation):
        assert "eng_Latn" in task.datasets[data].languages.values() and split in SPLITS
    for key, data in task.datasets.items():
        assert data.name == key and data.licence
        assert all(map(is_well_formed, data.languages.values()))


def test_every_file_of_the_folder_is_a_task():
    assert task_names() == sorted(NEEDED)
    with pytest.raises(ValueError, match="unknown task 'sib'; did you mean sib200?"):
        load_task("sib")


def test_languages_are_those_that_the_benchmarks_mean():
    meant = {
        (key, code): ours
        for name in NEEDED
        for key, data in load_task(name).datasets.items()
        for code, ours in data.languages.items()
    }
    for pair, ours in {
        ("xnli", "el"): "ell_Grek",
        ("xnli", "zh"): "zho_Hans",
        ("xnli", "ar"): "arb_Arab",
        ("americasnli", "aym"): "ayr_Latn",
        ("americasnli", "shp"): "shp_Latn",
        ("kardesnlu", "ug"): "uig_Cyrl",
        ("indicxnli", "or"): "ory_Orya",
        ("belebele", "ary_arab"): "ary_Arab",
        ("belebele", "npi_Latn"): "npi_Latn",
        ("nusax", "toba_batak"): "bbc_Latn",
        ("nusax", "bbc"): "bbc_Latn",
        ("nusax", "madurese"): "mad_Latn",
        ("nusax", "nij"): "nij_Latn",
        ("pawsx", "ko"): "kor_Hang",
        ("xquad", "ro"): "ron_Latn",
        ("sib200", "nqo_Nkoo"): "nqo_Nkoo",
    }.items():
        assert meant[pair] == ours
    lacking = "bzd cni hch nah oto shp tar uig ben hin npi sin urd mad nij bbc nqo"
    unknown = {ours for ours in meant.values() if ours not in FLORES_200}
    assert {code[:3] for code in unknown} == set(lacking.split())


def test_mnli(tmp_path):
    columns = {
        "premise": ["A.", "B.", "C."],
        "hypothesis": ["a", "b", "c"],
        "label": [0, 1, 2],
        "idx": [0, 1, 2],
    }
    write_parquet(tmp_path / "mnli" / "train-00000-of-00002.parquet", **columns)
    write_parquet(
        tmp_path / "mnli" / "train-00001-of-00002.parquet",
        **columns | {"premise": ["D.", "E.", "F."]},
    )
    write_parquet(tmp_path / "mnli" / "validation_matched-00000-of-00001.parquet", **columns)
    write_parquet(
        tmp_path / "mnli" / "test_matched-00000-of-00001.parquet",
        **columns | {"label": [-1, -1, -1]},
    )
    train = read("mnli", tmp_path, "train")
    assert [example.key for example in train] == list("012345")
    assert inferences(train)[2:4] == [("C.", "c", 2), ("D.", "a", 0)]
    assert inferences(read("mnli", tmp_path, "validation"))[1] == ("B.", "b", 1)
    assert {example.label for example in read("mnli", tmp_path, "test")} == {-1}


COLUMNS = """
    language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse
    sentence2_parse sentence1 sentence2 promptID pairID genre label1 match
"""
HEADER = COLUMNS.split()


def xnli_line(language, label, first, second):
    return "\t".join(
        [language, label, "", "", "", "", first, second, "1", "1", "facetoface", label, "True"]
    )


def test_xnli_as_one_file_for_all_languages(tmp_path):
    lines = [
        xnli_line("ar", "neutral", "قال", "نعم"),
        xnli_line("de", "contradiction", 'Er sagte: "Ja', "Nein, 'so"),
        xnli_line("de", "entailment", "\u2028Zwei\x85Zeilen", 'Ein Satz"'),
    ]
    write(tmp_path / "XNLI-1.0" / "xnli.dev.tsv", "\n".join(["\t".join(HEADER), *lines, ""]))
    examples = read("xnli", tmp_path, "validation", "deu_Latn")
    assert inferences(examples) == [
        ('Er sagte: "Ja', "Nein, 'so", 2),
        ("\u2028Zwei\x85Zeilen", 'Ein Satz"', 0),
    ]
    assert read("xnli", tmp_path / "XNLI-1.0", "validation", "deu_Latn") == examples
    assert dataset("xnli").present(tmp_path, "validation") == ["arb_Arab", "deu_Latn"]
    with pytest.raises(AbsentError, match="xnli has no validation examples in fra_Latn"):
        read("xnli", tmp_path, "validation", "fra_Latn")
    with pytest.raises(AbsentError, match=r"has no .*xnli\.test\.tsv"):
        read("xnli", tmp_path, "test", "deu_Latn")
    rows = [dict(zip(HEADER, line.split("\t"))) for line in lines]
    write(tmp_path / "jsonl" / "xnli.dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read("xnli", tmp_path / "jsonl", "validation", "deu_Latn") == examples


def test_xnli_from_the_hub(tmp_path):
    columns = {"premise": ["α"], "hypothesis": ["β"], "label": [1]}
    write_parquet(tmp_path / "el" / "validation-00000-of-00001.parquet", **columns)
    write_parquet(tmp_path / "all_languages" / "validation-00000-of-00001.parquet", other=[1])
    assert inferences(read("xnli", tmp_path, "validation", "ell_Grek")) == [("α", "β", 1)]
    assert dataset("xnli").present(tmp_path, "validation") == ["ell_Grek"]


def test_americasnli(tmp_path):
    lines = "gn\tHa' \"e\tNda\tneutral\ngn\tPéva\tUpéva\tentailment\n"
    write(tmp_path / "git" / "test" / "gn.tsv", lines)  # those of the test set have no header
    write(
        tmp_path / "git" / "dev" / "gn.tsv",
        "language\tpremise\thypothesis\tlabel\r\n" + lines.replace("\n", "\r\n"),
    )
    together = "language\tpremise\thypothesis\tlabel\nshp\tJoa\tRa\tcontradiction\n" + lines
    write(tmp_path / "one" / "dev.tsv", together)
    columns = {
        "language": ["gn", "gn"],
        "premise": ["Ha' \"e", "Péva"],
        "hypothesis": ["Nda", "Upéva"],
        "label": [1, 0],
    }
    write_parquet(tmp_path / "hub" / "gn" / "validation-00000-of-00001.parquet", **columns)
    del columns["language"]
    write_parquet(tmp_path / "config" / "gn" / "validation-00000-of-00001.parquet", **columns)
    expected = [("Ha' \"e", "Nda", 1), ("Péva", "Upéva", 0)]
    assert inferences(read("americasnli", tmp_path / "git", "test", "grn_Latn")) == expected
    for layout in ("git", "one", "hub", "config"):
        assert (
            inferences(read("americasnli", tmp_path / layout, "validation", "grn_Latn")) == expected
        )
    assert dataset("americasnli").present(tmp_path / "one", "validation") == [
        "grn_Latn",
        "shp_Latn",
    ]


def test_a_blank_sentence_of_a_pair_is_read_to_the_end(tmp_path):
    """As published: three premises of Nahuatl's test set are a space; the other one is read."""
    lines = "nah\t \tquena, amo\tneutral\nnah\ttle amo\t\tentailment\n"
    write(tmp_path / "test" / "nah.tsv", lines)
    examples = read("americasnli", tmp_path, "test", "nah_Latn")
    assert inferences(examples) == [(" ", "quena, amo", 1), ("tle amo", "", 0)]
    pack(examples, tmp_path / "corpus", language="spa_Latn", licence="")
    folders = build_encoder(tmp_path / "encoder"), build_decoder(tmp_path / "decoder")
    tokenizer = PairTokenizer(*folders, max_length=64)
    for index, example in enumerate(examples):
        sample, annotations = Corpus(tmp_path / "corpus").read_example(0, index)
        for reading in tokenizer.example(sample.text, "spa_Latn", annotations):
            tokens = [example.text[start:end] for start, end in reading.offsets_S2]
            assert "".join("".join(tokens).split()) == "".join(example.text.split())
            assert reading.spans_P2.tolist() == [[0, len(tokens)]]


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("nusax", "english/test.csv", "id,text,label\n1,a,neutral\n"),
        ("sib200", "eng_Latn/test.tsv", "index_id\tcategory\ttext\n1\ttravel\ta\n"),
        (
            "xnli",
            "xnli.test.tsv",
            "language\tgold_label\tsentence1\tsentence2\nen\tneutral\ta\tb\n",
        ),
        ("taxi1500", "eng_data/eng_test.tsv", "43001001\tFaith\ta\n"),
        ("xquad", "xquad.en.json", SQUAD),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, name, path, content):
    write(tmp_path / path, content)
    expected = read(name, tmp_path)
    write(tmp_path / path, BOM + content)
    assert read(name, tmp_path) == expected != []


@pytest.mark.parametrize("header", ["Unnamed: 0", BOM])
@pytest.mark.parametrize("root", ["Data/kazakh", "kazakh", "."])
def test_kardesnlu(tmp_path, header, root):
    rows = [
        [header, "gold_label", "sentence1", "sentence2", "s1_translation", "s2_translation"],
        [9, "entailment", "English, one", 'He said "no".', 'Ол, "жоқ"', "Иә"],
        [11, "neutral", "a", "b", "Үш", "Төрт"],
    ]
    write(tmp_path / root / "xnli.dev.kk.csv", table(*rows))
    expected = [('Ол, "жоқ"', "Иә", 0), ("Үш", "Төрт", 1)]
    assert inferences(read("kardesnlu", tmp_path, "validation", "kaz_Cyrl")) == expected


def test_indicxnli(tmp_path):
    rows = [
        {"premise": "एक", "hypothesis": "दो", "label": 0},
        {"premise": "तीन", "hypothesis": "चार", "label": 2},
    ]
    write(
        tmp_path / "forward" / "dev" / "xnli_hi.json", json.dumps({"dev": rows}, ensure_ascii=False)
    )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    write_parquet(tmp_path / "branch" / "hi" / "validation" / "0000.parquet", **columns)
    expected = [("एक", "दो", 0), ("तीन", "चार", 2)]
    assert inferences(read("indicxnli", tmp_path, "validation", "hin_Deva")) == expected
    assert inferences(read("indicxnli", tmp_path / "branch", "validation", "hin_Deva")) == expected
    write(tmp_path / "forward" / "test" / "xnli_hi.json", json.dumps({"test": rows + [3]}))
    with pytest.raises(
        ValueError, match=r"xnli_hi\.json, row 3: should be an object with columns, not '3'"
    ):
        read("indicxnli", tmp_path, "test", "hin_Deva")


def question(**columns):
    row = {
        "link": "https://en.wikinews.org/wiki/A",
        "question_number": 1,
        "flores_passage": "One. Two.\nThree.",
    }
    row |= {
        "question": "Which?",
        "mc_answer1": "a",
        "mc_answer2": "b",
        "mc_answer3": "c",
        "mc_answer4": "d",
    }
    return row | {"correct_answer_num": "3", "dialect": "swh_Latn", "ds": "2023-05-03"} | columns


@pytest.mark.parametrize("parent", ["data", "Belebele", "."])
def test_belebele(tmp_path, parent):
    rows = [
        question(),
        question(
            question_number=2, correct_answer_num=1, mc_answer2="", mc_answer4=4.5, mc_answer3=None
        ),
    ]
    write(tmp_path / parent / "swh_Latn.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first, second = read("belebele", tmp_path, "test", "swh_Latn")
    assert first.text == "One. Two.\nThree. Which?\n1 a\n2 b\n3 c\n4 d"
    assert (first.label, second.label) == (2, 0) and (first.key, second.key) == ("0", "1")
    assert [first.text[slice(*span)] for span in first.spans] == ["1 a", "2 b", "3 c", "4 d"]
    assert [second.text[slice(*span)] for span in second.spans] == ["1 a", "2 ", "3 ", "4 4.5"]
    assert first.text[slice(*first.cut)] == "One. Two.\nThree."
    assert dataset("belebele").present(tmp_path, "test") == ["swh_Latn"]
    assert dataset("belebele").present(tmp_path, "train") == []


def test_belebele_file_named_by_the_readmes_code(tmp_path):
    write(tmp_path / "data" / "ary_arab.jsonl", json.dumps(question()) + "\n")
    assert len(read("belebele", tmp_path, "test", "ary_Arab")) == 1


def test_belebele_training_set(tmp_path):
    columns = ["dataset", "split", "passage_id", "question_id", "passage", "question"]
    columns += [
        *(f"answer{number}" for number in range(1, 5)),
        "correct_answer",
        "correct_answer_num",
    ]
    rows = [
        ["", *columns],
        [
            0,
            "RACE",
            "train",
            "high1.txt",
            0,
            'Line "one".\n\nLine\ttwo.',
            "Who?",
            "A",
            "",
            7,
            'say "x"\ny',
            "A",
            "1.0",
        ],
        [0, "sciQ", "dev", 3, 5, "Water.", "What?", "B", "B", "C", "D", "C", "3"],
        [1, "ReClor", "train", 4, 4, "Logic.", "Why?", "A", "B", "C", "D", "D", "4"],
    ]
    write(tmp_path / "belebele_training_set.tsv", table(*rows, delimiter="\t"))
    first, second = read("belebele_training", tmp_path, "train")
    assert (
        first.text == 'Line "one".\n\nLine\ttwo. Who?\n1 A\n2 \n3 7\n4 say "x"\ny'
        and first.label == 0
    )
    assert first.text[slice(*first.spans[3])] == '4 say "x"\ny' and second.label == 3
    assert [example.label for example in read("belebele_training", tmp_path, "validation")] == [2]
    with pytest.raises(AbsentError, match="no train examples in fra_Latn"):
        read("belebele_training", tmp_path, "train", "fra_Latn")


TEXT = st.text(st.sampled_from("ab12 \n\t.अक中ไ\u200b"), max_size=8)


@given(passage=TEXT, question=TEXT, choices=st.lists(TEXT, min_size=1, max_size=5))
def test_choices_keep_their_characters(passage, question, choices):
    """Empty ones, ones that repeat, and ones with newlines and numbers in them."""
    example = compose("0", passage, question, choices, 0)
    assert [example.text[slice(*span)] for span in example.spans] == [
        f"{n} {choice}" for n, choice in enumerate(choices, 1)
    ]
    assert example.text[slice(*example.cut)] == passage
    assert example.text == "\n".join(
        [f"{passage} {question}", *(f"{n} {choice}" for n, choice in enumerate(choices, 1))]
    )
    example.check(example.text)


def test_nusax(tmp_path):
    rows = [
        ["id", "text", "label"],
        [219, 'Mangat, "tutu"\nbaris', "positive"],
        [7, "Bajilek", "negative"],
    ]
    write(tmp_path / "datasets" / "sentiment" / "ngaju" / "valid.csv", table(*rows))
    write_parquet(
        tmp_path / "hub" / "nij" / "nusa_x-senti-validation.parquet",
        id=["219", "7"],
        text=[rows[1][1], "Bajilek"],
        label=[2, 0],
    )
    examples = read("nusax", tmp_path, "validation", "nij_Latn")
    assert [(example.key, example.text, example.label) for example in examples] == [
        ("219", rows[1][1], 2),
        ("7", "Bajilek", 0),
    ]
    assert not examples[0].has_ranges
    assert read("nusax", tmp_path / "hub", "validation", "nij_Latn") == examples


def test_pawsx(tmp_path):
    header = "id\tsentence1\tsentence2\tlabel\n"
    lines = '1\tEr sagt "ja.\tJa, sagt er\t1\n2\tNS\tzwei\t0\n3\tdrei\tNS\t1\n4\t"vier"\tNSA\t0\n'
    lines += "5\t\t\t0\n6\tsechs\t\t1\n"
    for name in ("translated_train", "dev_2k", "test_2k"):
        write(tmp_path / "x-final" / "de" / f"{name}.tsv", header + lines)
    write(tmp_path / "x-final" / "en" / "train.tsv", header + lines)
    for split in SPLITS:
        assert inferences(read("pawsx", tmp_path, split, "deu_Latn")) == [
            ('Er sagt "ja.', "Ja, sagt er", 1),
            ('"vier"', "NSA", 0),
        ]
    assert len(read("pawsx", tmp_path, "train")) == 2
    assert dataset("pawsx").present(tmp_path, "train") == ["deu_Latn", "eng_Latn"]


@pytest.mark.parametrize("code", ["sat_Olck", "nqo_Nkoo", "qaa_Latn"])
def test_sib200(tmp_path, code):
    rows = [
        ["index_id", "category", "text"],
        [61, "politics", 'She said, "no"\tto it'],
        [1523, "geography", "plain"],
    ]
    write(tmp_path / "data" / "annotated" / code / "dev.tsv", table(*rows, delimiter="\t"))
    write(tmp_path / "data" / "annotated" / code / "labels.txt", "politics\n")
    examples = read("sib200", tmp_path, "validation", code)
    assert [(example.key, example.text, example.label) for example in examples] == [
        ("61", rows[1][2], 2),
        ("1523", "plain", 6),
    ]
    assert dataset("sib200").present(tmp_path, "validation") == [code]
    assert dataset("sib200").present(tmp_path, "test") == []


VERSES = "43001001\tFaith\tIn the beginning\n45001002\tGrace\tgrace to you\n66001003\tSin\twoe\n"


def test_taxi1500(tmp_path):
    write(tmp_path / "eng_data" / "eng_test.tsv", VERSES)
    full = "# language_name: Swahili\n\n# year 1990\t2001\n43001001\tHapo mwanzo\n"
    full += "45001002\tneema\n66001003\tole\n99\tx\n"
    editions = tmp_path / "Taxi1500-c_v3.0"
    write(editions / "swh-x-bible-a.txt", "43001001\tMwanzoni\n")
    write(editions / "swh-x-bible-b.txt", full)
    write(editions / "swh_swhb.ebible.txt", full.replace("neema", "rehema"))
    write(editions / "swhx-x-bible.txt", full)
    write(editions / "kas-x-bible-arab.txt", "45001002\tفضل\n")
    write(editions / "kas-x-bible-deva.txt", "43001001\tअनुग्रह\n45001002\tशांति\n")
    write(editions / "aze-x-bible.txt", "45001002\tlütf\n45001009\t\n43001001\t\n")
    write(editions / "zho-x-bible.txt", "43001001\t太初有道\n")
    write(editions / "aai-x-bible.txt", "66001003\tarau\n")
    assert [example.text for example in read("taxi1500", tmp_path)] == [
        "In the beginning",
        "grace to you",
        "woe",
    ]
    swahili = read("taxi1500", tmp_path, "test", "swh_Latn")
    assert [(example.key, example.text, example.label) for example in swahili] == [
        ("43001001", "Hapo mwanzo", 1),
        ("45001002", "neema", 4),
        ("66001003", "ole", 3),
    ]
    assert [example.text for example in read("taxi1500", tmp_path, "test", "kas_Arab")] == ["فضل"]
    assert [example.text for example in read("taxi1500", tmp_path, "test", "kas_Deva")] == [
        "अनुग्रह",
        "शांति",
    ]
    assert [example.label for example in read("taxi1500", tmp_path, "test", "azj_Latn")] == [4]
    assert [example.text for example in read("taxi1500", tmp_path, "test", "aai_Latn")] == ["arau"]
    codes = ["azj_Latn", "eng_Latn", "kas_Arab", "kas_Deva", "swh_Latn", "zho_Hans", "zho_Hant"]
    assert dataset("taxi1500").present(tmp_path, "test") == codes
    with pytest.raises(AbsentError, match="has no edition in swh_Arab"):
        read("taxi1500", tmp_path, "test", "swh_Arab")


def squad(passage, *questions):
    paragraphs = [{"context": passage, "qas": list(questions)}]
    return json.dumps(
        {"data": [{"title": "A", "paragraphs": paragraphs}], "version": "1.1"}, ensure_ascii=False
    )


def asked(key, text, *answers):
    return {
        "id": key,
        "question": text,
        "answers": [{"text": answer, "answer_start": start} for answer, start in answers],
    }


def test_xquad(tmp_path):
    passage = "क ख क 😀 घ"
    questions = [
        asked("56beb4343aeaaa14008c925b", "कौन?", ("क", 4), ("घ", 8), ("क", 4)),
        asked("b", "कौन?", ("ख", 2)),
    ]
    write(tmp_path / "xquad.hi.json", squad(passage, *questions))
    write(tmp_path / "train-v1.1.json", squad("A b.", asked("c", "Which?", ("b", 2))))
    first, second = read("xquad", tmp_path, "test", "hin_Deva")
    assert first.text == f"कौन?\n{passage}" and first.key == "56beb4343aeaaa14008c925b"
    assert [first.text[slice(*span)] for span in (*first.answers, *second.answers)] == [
        "क",
        "घ",
        "ख",
    ]
    assert (
        first.answers[0] == (9, 10)
        and first.spans == (first.cut,) == ((5, 14),)
        and first.label == -1
    )
    assert [example.key for example in read("squad", tmp_path, "train")] == ["c"]
    assert dataset("squad").present(tmp_path, "test") == []
    write(tmp_path / "xquad.ar.json", squad(passage, asked("a", "ما؟", ("ग", 2))))
    where = r"xquad\.ar\.json, article 1, paragraph 1, question 1, answer 1"
    with pytest.raises(ValueError, match=f"{where}: column 'answer_start' .* 'ग', not 2"):
        read("xquad", tmp_path, "test", "arb_Arab")


XNLI_LINES = "\t".join(HEADER) + "\n" + xnli_line("en", "neutral", "a", "b") + "\n"
MALFORMED = {
    "too few columns": (
        "xnli",
        "xnli.test.tsv",
        XNLI_LINES + "en\tneutral\n",
        r"xnli\.test\.tsv:3: 2 columns, not 13: language, ",
    ),
    "label": (
        "xnli",
        "xnli.test.tsv",
        XNLI_LINES + xnli_line("en", "-", "a", "b"),
        r"tsv:3: column 'gold_label' should be one of entailment, neutral, contradiction, "
        r"or its number, not '-'",
    ),
    "empty": (
        "xnli",
        "xnli.test.tsv",
        XNLI_LINES + xnli_line("en", "neutral", "", " "),
        r"tsv:3: column 'sentence2' should be text, not ' '",
    ),
    "no column": (
        "xnli",
        "xnli.test.tsv",
        "language\tlabel\nen\t0\n",
        r"xnli\.test\.tsv:2: no column 'sentence1' among 'language', 'label'",
    ),
    "not JSON": (
        "belebele",
        "eng_Latn.jsonl",
        json.dumps(question()) + "\n{",
        r"eng_Latn\.jsonl:2: not JSON",
    ),
    "no object": (
        "belebele",
        "eng_Latn.jsonl",
        "[1]\n",
        r"eng_Latn\.jsonl:1: should be an object with columns",
    ),
    "number": (
        "belebele",
        "eng_Latn.jsonl",
        json.dumps(question(correct_answer_num="0")),
        r"jsonl:1: column 'correct_answer_num' should be a whole number from 1 to 4, not '0'",
    ),
    "half": (
        "belebele",
        "eng_Latn.jsonl",
        json.dumps(question(mc_answer1="\ud800")),
        r"jsonl:1: column 'mc_answer1' .* surrogate",
    ),
    "choice": (
        "belebele",
        "eng_Latn.jsonl",
        json.dumps(question(mc_answer1=["a"])),
        r"jsonl:1: column 'mc_answer1' should be text",
    ),
    "quote": (
        "sib200",
        "eng_Latn/test.tsv",
        'index_id\tcategory\ttext\n1\ttravel\t"a"b\n',
        r"test\.tsv:2: .*expected after",
    ),
    "twice": (
        "sib200",
        "eng_Latn/test.tsv",
        "index_id\tcategory\ttext\n1\ttravel\ta\n1\ttravel\tb\n",
        r"two examples have the key '1'",
    ),
    "verse": (
        "taxi1500",
        "eng_data/eng_test.tsv",
        "id\tFaith\ta\n",
        r"eng_test\.tsv:1: column 'id' should be a whole number",
    ),
    "list": (
        "xquad",
        "xquad.en.json",
        '{"data": {"a": 1}}',
        r"xquad\.en\.json: column 'data' should be a list",
    ),
    "no data": ("xquad", "xquad.en.json", "[]", r"xquad\.en\.json: no column 'data'"),
    "no context": (
        "xquad",
        "xquad.en.json",
        '{"data": [{"paragraphs": [{"qas": [{}]}]}]}',
        r"article 1, paragraph 1: no column 'context'",
    ),
    "bad JSON": ("xquad", "xquad.en.json", '{"data"', r"xquad\.en\.json: not JSON"),
    "id": (
        "nusax",
        "english/test.csv",
        "id,text,label\nx,a,neutral\n",
        r"test\.csv:2: column 'id' should be a whole number",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_rows_are_named_in_one_line(tmp_path, kind):
    name, path, content, message = MALFORMED[kind]
    write(tmp_path / path, content)
    with pytest.raises(ValueError, match=message) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value) and not isinstance(error.value, AbsentError)


def test_malformed_files_are_named_in_one_line(tmp_path):
    write(tmp_path / "x" / "en" / "test-00000-of-00001.parquet", "PAR1 no")
    with pytest.raises(
        ValueError, match=r"test-00000-of-00001\.parquet is not a sound Parquet file"
    ):
        read("xnli", tmp_path / "x")
    (tmp_path / "xnli.test.tsv").write_bytes(XNLI_LINES.encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"xnli\.test\.tsv: not UTF-8 after line"):
        read("xnli", tmp_path)
    write_parquet(
        tmp_path / "y" / "en" / "test-00000-of-00001.parquet",
        premise=["a", None],
        hypothesis=["b", "c"],
        label=[0, 1],
    )
    with pytest.raises(
        ValueError, match=r"parquet, row 2: column 'premise' should be text, not None"
    ):
        read("xnli", tmp_path / "y")


def test_splits_have_our_names(tmp_path):
    with pytest.raises(
        ValueError, match="xnli: unknown split 'dev'; the splits are train, validation, test"
    ):
        read("xnli", tmp_path, "dev")


def test_packed_examples_are_a_corpus(tmp_path):
    examples = [
        compose("b-1", "A passage.", "Which?", ["a", "", "a", "b\nc"], 3),
        Example(key="a", text="plain", label=2),
        Example(key="c_2", text="क\nb", answers=((2, 3), (0, 1)), spans=((0, 3),), cut=(0, 1)),
    ]
    manifest = pack(examples, tmp_path / "corpus", language="qaa_Latn", licence="CC0-1.0")
    assert (manifest.samples, manifest.language, manifest.licence) == (3, "qaa_Latn", "CC0-1.0")
    corpus = Corpus(tmp_path / "corpus")
    for index, example in enumerate(examples):
        sample, annotations = corpus.read_example(0, index)
        assert (sample.key, sample.text) == (example.key, example.text) == corpus.read(0, index)
        assert Example(key=sample.key, text=sample.text, **vars(annotations)) == example
    with pytest.raises(ValueError, match="already there and not empty"):
        pack(examples, tmp_path / "corpus", language="eng_Latn", licence="")
    with pytest.raises(ValueError, match="nothing to write"):
        pack([], tmp_path / "empty", language="eng_Latn", licence="")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("keys", [["a", "a"], ["a", "b", "a"], ["a.b"], ["a/b"], [""]])
def test_keys_are_distinct_and_fit_webdataset(tmp_path, keys):
    """A dot would end a key there, a slash make a folder."""
    with pytest.raises(ValueError, match=f"corpus: .*the key '{keys[-1]}'"):
        pack(
            [Example(key=key, text="a") for key in keys],
            tmp_path / "corpus",
            language="eng_Latn",
            licence="",
        )
    assert not (tmp_path / "corpus").exists()


def test_a_split_is_packed_once_and_never_taken_for_another(tmp_path):
    for name, text in (("one", "first"), ("two", "second")):
        annotated = tmp_path / name / "data" / "annotated" / "eng_Latn"
        annotated.mkdir(parents=True)
        (annotated / "train.tsv").write_text(f"index_id\tcategory\ttext\n1\ttravel\t{text}\n")
    task, out = load_task("sib200"), tmp_path / "corpus"
    for _ in range(2):
        pack_split(task, f"sib200:{tmp_path / 'one'}", "train", "eng_Latn", out)
        assert Corpus(out).read(0, 0) == ("1", "first")
    with pytest.raises(ValueError, match="was made of .*one.* remove it or choose another run.dir"):
        pack_split(task, f"sib200:{tmp_path / 'two'}", "train", "eng_Latn", out)
