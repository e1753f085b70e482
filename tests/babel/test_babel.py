"""The synthetic land: languages differ, no fact leaks, files have their layouts, models load."""

import csv
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM

from mtllm_engine import babel, cli
from mtllm_engine.babel.land import (
    CATEGORIES,
    CONTENT,
    RELATIONS,
    TOPICS,
    Clause,
    Land,
    build_land,
)
from mtllm_engine.babel.models import pooled_terms, token_distance, train_llama_tokenizer, word_loss
from mtllm_engine.model.build import build_stack
from mtllm_engine.tasks import load_task
from mtllm_engine.tasks.nli import LABELS
from tests.support.machine import ROOT
from tests.support.tiny import build_config

TINY = babel.Size(
    documents=120,
    pairs=0.05,
    examples=84,
    inferences=60,
    lines=42,
    width=32,
    mt_steps=3,
    llm_steps=3,
)
SEEDS = [0, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A land whose models have hardly learned anything."""
    folder = tmp_path_factory.mktemp("babel")
    babel.build_sized(folder, TINY, seed=7)
    return folder


def names(land: Land, *splits: str) -> set[str]:
    return {land.english.name(entity.name) for split in splits for entity in land.entities[split]}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def topics(category: str) -> set[str]:
    """Words of a category in any form that English gives them."""
    nouns, verb = TOPICS[category]
    return {form for noun in nouns for form in (noun, noun + "s")} | {verb, verb + "s", verb + "ed"}


TOPIC_WORDS = set().union(*map(topics, CATEGORIES))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_land_is_a_function_of_its_seed(seed: int):
    one, again, other = build_land(seed), build_land(seed), build_land(seed + 1)
    assert one == again and one.meanings == again.meanings
    for draw in (
        lambda land: land.documents("train", 20),
        lambda land: land.task("test", 20),
        lambda land: land.inferences("test", 20),
    ):
        assert draw(one) == draw(again) != draw(other)
    assert all(ours.roots != theirs.roots for ours, theirs in zip(one.foreign, other.foreign))
    assert one.entities != other.entities


@pytest.mark.parametrize("seed", SEEDS)
def test_translations_never_state_a_fact(seed: int):
    land = build_land(seed)
    everyone = names(land, *land.entities)
    said = [
        land.english.say(clause)
        for clause in (*land.meanings, *land.lines("dev", 200), *land.lines("devtest", 200))
    ]
    named = [words(line) for line in said if words(line) & everyone]
    assert len(named) > len(said) / 2 and set().union(*named) >= everyone
    assert not set().union(*named) & TOPIC_WORDS
    # The encoder knows the words all the same.
    assert set().union(*map(words, said)) >= TOPIC_WORDS & set(CONTENT)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_task_needs_knowledge_that_only_documents_state(seed: int):
    land = build_land(seed)
    splits = {split: land.task(split, 210) for split in land.entities}
    for split, examples in splits.items():
        texts = [words(land.english.say(clause)) for clause, _ in examples]
        assert not set().union(*texts) & TOPIC_WORDS
        assert all(len(text & names(land, split)) == 2 for text in texts)
        assert sorted(category for _, category in examples) == sorted(CATEGORIES * 30)
    for one, other in itertools.combinations(land.entities, 2):
        assert not names(land, one) & names(land, other)


def stated_facts(land: Land) -> dict[str, set[str]]:
    """The topic words that documents put into one sentence with a name."""
    facts = {name: set() for name in names(land, *land.entities)}
    for document in land.documents("train", 6000):
        for sentence in document.split("."):
            for name in words(sentence) & set(facts):
                facts[name] |= words(sentence) & TOPIC_WORDS
    return facts


def categories(known: set[str]) -> set[str]:
    return {category for category in CATEGORIES if known & topics(category)}


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_state_what_each_entity_has_to_do_with(seed: int):
    land = build_land(seed)
    facts = stated_facts(land)
    for entity in land.everyone:
        assert len(facts[land.english.name(entity.name)]) >= 3
        assert facts[land.english.name(entity.name)] <= topics(entity.category)


@pytest.mark.parametrize("seed", SEEDS)
def test_inferences_follow_from_what_documents_state(seed: int):
    land = build_land(seed)
    facts = stated_facts(land)
    for split in land.entities:
        examples = land.inferences(split, 210)
        assert Counter(relation for *_, relation in examples) == dict.fromkeys(RELATIONS, 70)
        for premise, hypothesis, relation in examples:
            said, claimed = words(land.english.say(premise)), words(land.english.say(hypothesis))
            mentioned = said & facts.keys()
            assert (
                len(mentioned) == 2
                and mentioned <= names(land, split)
                and not claimed & facts.keys()
            )
            real = categories(set().union(*map(facts.get, mentioned)))
            topical = categories(claimed)
            assert len(real) == len(topical) == 2 and not said & TOPIC_WORDS
            assert relation == ("contradiction", "neutral", "entailment")[len(real & topical)]


@pytest.mark.parametrize("side", [0, 1], ids=["premise", "hypothesis"])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_sentence_alone_does_not_tell_the_relation(seed: int, side: int):
    """A naive Bayes learns nothing from its words, pairs of words, and what its names stand for."""
    land = build_land(seed)
    facts = stated_facts(land)
    seen = {relation: Counter() for relation in RELATIONS}
    for example in land.inferences("train", 5040):
        seen[example[2]].update(_features(land, example[side], facts))
    right = 0
    tests = land.inferences("test", 3000)
    for example in tests:
        features = _features(land, example[side], facts)
        likely = {
            relation: sum(math.log(1 + counts[each]) for each in features)
            for relation, counts in seen.items()
        }
        right += max(likely, key=likely.get) == example[2]
    assert abs(right / len(tests) - 1 / 3) < 0.03


def _features(land: Land, clause: Clause, facts: dict[str, set[str]]) -> set:
    said = words(land.english.say(clause))
    known = said | categories(said).union(
        *(categories(facts[name]) for name in said & facts.keys())
    )
    return known | set(itertools.combinations(sorted(known), 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_languages_differ_but_for_relatives(seed: int):
    land = build_land(seed)
    shared = {}
    for one, other in itertools.combinations(land.languages, 2):
        same = sum(one.roots[word] == other.roots[word] for word in CONTENT) / len(CONTENT)
        assert same < 0.15, (one.code, other.code)
        shared[one.code, other.code] = _alike(one.roots, other.roots)
    relatives = {(language.parent, language.code) for language in land.foreign if language.parent}
    assert len(relatives) == 2
    assert min(shared[pair] for pair in relatives) > 1.5 * max(
        shared[pair] for pair in shared.keys() - relatives
    )
    assert len({language.order for language in land.languages}) == len(land.languages)


def _alike(ours: dict[str, str], theirs: dict[str, str]) -> float:
    """The share of the words of which half the letters stand at the same place."""
    matches = [
        sum(a == b for a, b in zip(ours[word], theirs[word])) / len(ours[word]) for word in CONTENT
    ]
    return sum(match >= 0.5 for match in matches) / len(matches)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_words_of_a_language_are_one(seed: int):
    land = build_land(seed)
    for language in land.languages:
        assert len({language.name(entity.name) for entity in land.everyone}) == len(land.everyone)
        assert len(set(language.roots.values())) == len(CONTENT)


def test_files_have_their_published_layouts(folder: Path):
    land = build_land(7, TINY.pairs)
    codes = [language.code for language in land.languages]
    for split in ("dev", "devtest"):
        files = sorted((folder / "flores200_dataset" / split).iterdir())
        assert [file.name for file in files] == sorted(f"{code}.{split}" for code in codes)
        assert {len(file.read_text().splitlines()) for file in files} == {TINY.lines}
    annotated = folder / "sib200" / "data" / "annotated"
    rows = {}
    for path in annotated.rglob("*.tsv"):
        with path.open(newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows[path.parent.name, path.stem] = list(reader)
            assert reader.fieldnames == ["index_id", "category", "text"]
    assert set(rows) == {(code, split) for code in codes for split in ("dev", "test")} | {
        ("eng_Latn", "train")
    }
    for (code, split), examples in rows.items():
        assert {row["category"] for row in examples} == set(CATEGORIES)
        assert len({row["index_id"] for row in examples}) == len(examples)
        same = rows["eng_Latn", split]  # line-parallel, as SIB-200 is
        columns = ("index_id", "category")
        assert [[row[name] for name in columns] for row in examples] == [
            [row[name] for name in columns] for row in same
        ]
        assert code == "eng_Latn" or all(
            row["text"] != other["text"] for row, other in zip(examples, same)
        )
    for name in ("train", "validation", "long"):
        lines = (folder / "corpus" / f"{name}.jsonl").read_text().splitlines()
        assert all(set(json.loads(line)) == {"text"} for line in lines)


def test_inferences_are_files_as_the_hub_has_them(folder: Path):
    land = build_land(7, TINY.pairs)
    (train,) = (folder / "mnli").iterdir()
    assert train.name == "train-00000-of-00001.parquet"
    columns = pyarrow.parquet.read_table(train)
    assert columns.column_names == ["premise", "hypothesis", "label", "idx"]
    assert columns["idx"].to_pylist() == list(range(TINY.inferences))
    codes = {language.code: language.code for language in land.languages} | {"eng_Latn": "en"}
    assert {path.name for path in (folder / "xnli").iterdir()} == set(codes.values())
    for split, draw in (("validation", "dev"), ("test", "test")):
        examples = land.inferences(draw, TINY.lines)
        for language in land.languages:
            rows = pyarrow.parquet.read_table(
                folder / "xnli" / codes[language.code] / f"{split}-00000-of-00001.parquet"
            )
            assert rows.to_pydict() == {
                "premise": [language.say(premise) for premise, _, _ in examples],
                "hypothesis": [language.say(hypothesis) for _, hypothesis, _ in examples],
                "label": [LABELS.index(relation) for _, _, relation in examples],
            }
            assert list(map(str, rows.schema.types)) == ["string", "string", "int64"]


def test_the_readers_of_mnli_and_xnli_read_them(folder: Path):
    land = build_land(7, TINY.pairs)
    task = load_task("nli")
    mnli, xnli = (task.datasets[name] for name in ("mnli", "xnli"))
    assert len(list(mnli.read(folder / "mnli", "train", "eng_Latn"))) == TINY.inferences
    for split in ("validation", "test"):
        assert xnli.present(folder / "xnli", split) == sorted(
            language.code for language in land.languages
        )
        for language in land.languages:
            examples = list(xnli.read(folder / "xnli", split, language.code))
            assert Counter(example.label for example in examples) == dict.fromkeys(
                range(3), TINY.lines / 3
            )


@pytest.mark.parametrize("seed", [*SEEDS, 10, 11, 12])
def test_of_the_long_documents_thirty_percent_are_cut(seed: int):
    long = build_land(seed).documents("long", 1500, sentences=babel.LONG)
    # No tokenizer makes fewer tokens than words.
    lengths = [len(re.findall(r"\w+|\.", text)) for text in long]
    assert sum(length > 128 for length in lengths) >= 0.3 * len(lengths)


def test_the_second_llm_reads_other_tokens():
    land = build_land(7)
    documents = land.documents("train", 6000)
    long = " ".join(land.documents("long", 20, sentences=babel.LONG))
    words = len(re.findall(r"\w+|\.", long))
    counts = [
        len(train_llama_tokenizer(documents, size)(long)["input_ids"])
        for size in (900, babel.FINER)
    ]
    assert counts[0] < 1.01 * words and counts[1] > 1.4 * words


def test_models_are_ordinary_checkpoints(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "mt", src_lang="qaa_Latn")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "mt")
    codes = [language.code for language in build_land(7).languages]
    assert all(tokenizer.convert_tokens_to_ids(code) != tokenizer.unk_token_id for code in codes)
    inputs = tokenizer("mapo", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("qaa_Latn")
    english = tokenizer.convert_tokens_to_ids("eng_Latn")
    translation_BL = model.generate(**inputs, forced_bos_token_id=english, max_new_tokens=4)
    assert translation_BL[0, 1] == english
    llm = LlamaForCausalLM.from_pretrained(folder / "llm")
    text = "the old dog greets Danlan."
    ids_BL = AutoTokenizer.from_pretrained(folder / "llm")(text, return_tensors="pt")["input_ids"]
    assert torch.isfinite(llm(ids_BL).logits).all()
    paths = {"encoder": str(folder / "mt"), "decoder": str(folder / "llm"), "causal": True}
    stack, weights = build_stack(build_config(folder, model=paths))
    assert (
        weights.read("decoder.embedding.weight", 0, 8).shape == (8,)
        and len(stack.decoder.layers) == 4
    )


def test_both_models_share_one_line_of_the_terminal(folder: Path, tmp_path: Path):
    """While they learn; the next output begins below it."""
    shutil.copytree(folder, tmp_path / "land", ignore=lambda *_: {"llm", "mt"})
    build = f"babel.build_sized(pathlib.Path({str(tmp_path / 'land')!r}), babel.{TINY}, 7)"
    code = f"import pathlib; from mtllm_engine import babel; {build}"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    output = b"".join(iter(lambda: read_terminal(ours), b"")).decode()
    assert process.wait() == 0 and "\x1b[A" not in output
    *shown, end = re.split("[\r\n]+", output)
    assert not end and all(line.startswith("training llm and mt: ") for line in filter(None, shown))
    steps = TINY.llm_steps + TINY.mt_steps
    assert shown[-1].startswith("training llm and mt: 100%") and f" {steps}/{steps} " in shown[-1]


def read_terminal(descriptor: int) -> bytes:
    """What there is; nothing once whoever wrote has ended."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def test_what_exists_is_left_alone(folder: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / "report.json").unlink()
    report = babel.build_sized(folder, TINY, seed=7)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [folder / "report.json"]
    shown = babel.table(report)
    assert all(row["language"] in shown for row in report["languages"])
    assert len(report["languages"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size huge", "--size huge is none of small, medium"),
        ("--seed 8", "holds the small land of seed 7"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, tmp_path: Path, capsys):
    (tmp_path / "babel.json").write_text('{"size": "small", "seed": 7}')
    assert cli.main(["babel", "build", str(tmp_path), *arguments.split()]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_a_file_is_no_folder(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["babel", "build", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_words_are_likely_where_some_state_tells_them(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lines, length, num_words, width, vocab = 1 + seed, 3 + seed, 2 + seed, 8, 11
    head = torch.nn.Linear(width, vocab, bias=False)
    memory_BLE = torch.randn(lines, length, width, generator=generator)
    real_BL = torch.arange(length) < torch.randint(1, length + 1, (lines, 1), generator=generator)
    words_BW = torch.randint(1, vocab, (lines, num_words), generator=generator)
    words_BW[0, 1:] = 0  # padding
    loss = word_loss(head, memory_BLE, real_BL, words_BW, 0)
    likelihoods = []
    for states_LE, real_L, words_W in zip(memory_BLE, real_BL, words_BW):
        told_LV = torch.softmax(head(states_LE[real_L]), dim=-1)
        likelihoods += [told_LV[:, word].mean() for word in words_W if word]
    torch.testing.assert_close(loss, -torch.stack(likelihoods).log().mean())


@pytest.mark.parametrize("seed", range(5))
def test_distances_between_translations(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lines, length, width = 2 + seed, 3 + seed, 16
    ours_BLE = torch.randn(lines, length, width, generator=generator)
    order_L = torch.randperm(length, generator=generator)
    same_BLE = torch.cat([ours_BLE, ours_BLE[:, order_L]])  # in another order of words
    other_BLE = torch.cat([ours_BLE, torch.randn(lines, length, width, generator=generator)])
    real_BL = torch.ones(2 * lines, length, dtype=torch.bool)
    for distance in (lambda states, real: pooled_terms(states, real)[1], token_distance):
        assert distance(same_BLE, real_BL) < 0.05 and distance(other_BLE, real_BL) > 0.5
        padded_BLE = torch.cat([other_BLE, torch.full((2 * lines, 2, width), 9.0)], dim=1)
        padded_real_BL = torch.nn.functional.pad(real_BL, (0, 2))
        torch.testing.assert_close(
            distance(padded_BLE, padded_real_BL), distance(other_BLE, real_BL)
        )
    assert pooled_terms(same_BLE, real_BL)[0] < pooled_terms(other_BLE, real_BL)[0]
