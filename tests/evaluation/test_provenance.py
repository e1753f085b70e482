"""No table mixes what different makers made, and what is left out of one is named."""

import csv
import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtllm_engine.config import Config
from mtllm_engine.data.parts import find_parts
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation.predictions import TRANSLATION_COUNTS, Predictions, load, save
from mtllm_engine.evaluation.provenance import sort_out
from mtllm_engine.evaluation.tables import write
from mtllm_engine.evaluation.translate import Translator
from mtllm_engine.finetune import finetune
from mtllm_engine.tasks.sib200 import SIB200
from mtllm_engine.train import train
from tests.support.predictions import build
from tests.support.stages import (
    ALONE,
    build_models,
    evaluation_config,
    finetuning_config,
    stage2_config,
    write_topics,
)
from tests.support.stages import stage1_config as stage1
from tests.support.tiny import build_encoder

LANGUAGES = ("deu_Latn", "eng_Latn", "swh_Latn")


def maker(evaluated: int, checkpoint: str = "a", test: str = "t", commit: str = "c", **settings):
    about = {"checkpoint": checkpoint, "test": test, "commit": commit}
    return about | {"evaluated": f"{evaluated:04d}", "settings": {"length": 5} | settings}


def names(items: list[Predictions]) -> list[tuple]:
    return [item.identity for item in items]


@st.composite
def evaluations(draw) -> list[Predictions]:
    """What is in a folder after a few evaluations, each of some systems, languages and one seed."""
    files: dict[tuple, Predictions] = {}
    for number in range(draw(st.integers(1, 5))):
        seed = draw(st.integers(0, 1))
        length, test = draw(st.integers(1, 2)), draw(st.sampled_from("tu"))
        checkpoints = {name: draw(st.sampled_from("ab")) for name in ("llm", "stack")}
        given_as = draw(st.sampled_from(["swh_Latn", "deu_Latn"]))
        for system in draw(st.sets(st.sampled_from(["llm", "stack"]), min_size=1)):
            for language in draw(st.sets(st.sampled_from(LANGUAGES), min_size=1)):
                made = maker(number, checkpoints[system], test, length=length)
                made = draw(st.sampled_from([made, made, made, None])) if not number else made
                about = {"maker": made, "language_given": given_as if system == "stack" else None}
                item = build(system, language, seed, n=2, **about)
                files[item.identity] = item
    return list(files.values())


def belong(first: Predictions, second: Predictions) -> bool:
    same_system = first.system == second.system
    same_place = first.language == second.language
    if same_system and same_place and first.language_given != second.language_given:
        return False
    ours, theirs = first.maker, second.maker
    if not (ours and theirs):
        return not same_system or ours == theirs
    if same_place and ours["test"] != theirs["test"]:
        return False
    if same_system and ours["settings"] != theirs["settings"]:
        return False
    same_run = same_system and first.seed == second.seed
    return not same_run or ours["checkpoint"] == theirs["checkpoint"]


@given(evaluations(), st.randoms(use_true_random=False))
def test_what_is_kept_belongs_together_and_holds_all_that_was_evaluated_last(
    items: list[Predictions], generator: random.Random
):
    kept, left = sort_out(items)
    for pair in itertools.combinations(kept, 2):
        assert belong(*pair)
    last = max((item.maker or {}).get("evaluated", "") for item in items)
    newest = [item for item in items if (item.maker or {}).get("evaluated", "") == last]
    assert all(item in kept for item in newest)
    # Each is in one of the two; nothing is left out that would fit, and order does not matter.
    named = [
        (each.system, each.dataset, code, each.seed) for each in left for code in each.languages
    ]
    assert sorted(names(kept) + named) == sorted(names(items))
    for item in items:
        assert item in kept or not all(belong(item, other) for other in kept)
    shuffled = generator.sample(items, len(items))
    assert names(sort_out(shuffled)[0]) == [i.identity for i in shuffled if i in kept]


def test_predictions_that_do_not_say_what_the_encoder_reads_at_once_are_of_whole_texts():
    reads = {"model.encoder": "e"}
    older = build("stack", "swh_Latn", maker=maker(0, **reads))
    for parts, other in (("whole", []), ("lines", ["data.parts"])):
        newer = build("stack", "deu_Latn", maker=maker(1, **reads, **{"data.parts": parts}))
        _, left = sort_out([older, newer])
        assert [each.differs for each in left] == other


def test_translations_of_sentences_and_of_lines_do_not_mix():
    """What does not say was translated line by line."""
    key = "evaluate.translate_by"
    older = build("translate_test", "swh_Latn", maker=maker(0, translator="t"))
    for by, differs in (("lines", []), ("sentences", [key])):
        made = maker(1, translator="t", **{key: by})
        _, left = sort_out([older, build("translate_test", "deu_Latn", maker=made)])
        assert [each.differs for each in left] == differs


def test_other_commits_are_told_and_mix(tmp_path: Path):
    save(tmp_path, build("llm", "swh_Latn", maker=maker(0, commit="before")))
    save(tmp_path, build("stack", "swh_Latn", maker=maker(1, commit="after")))
    text = write(tmp_path, resamples=10).read_text()
    told = "different commits: after (stack, seed 42), before (llm, seed 42)\n"
    assert told in text and "| llm | stack |" in text and "left out" not in text


def test_a_baseline_that_is_left_out_compares_nothing(tmp_path: Path):
    save(tmp_path, build("translate_test", "swh_Latn", maker=maker(0, test="u")))
    save(tmp_path, build("stack", "swh_Latn", maker=maker(1)))
    write(tmp_path, baseline="translate_test", resamples=10)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["comparisons"] == []
    (left,) = content["left_out"]
    assert (left["system"], left["languages"]) == ("translate_test", ["swh_Latn"])


@given(st.integers(0, 1 << 30))
def test_a_flipped_bit_of_predictions_is_noticed(tmp_path_factory, seed: int):
    generator = random.Random(seed)
    folder = tmp_path_factory.mktemp("flipped")
    path = save(folder, build(n=5, maker=maker(0), latency_s=1.5, language_status="known"))
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"predictions-swh_Latn-42.jsonl"):
        load(folder)


def test_a_file_of_anothers_program_needs_neither_digest_nor_maker(tmp_path: Path):
    path = save(tmp_path, build(n=3))
    first, rest = path.read_text().split("\n", 1)
    header = json.loads(first)
    del header["sha256"], header["maker"], header["cut"], header["unfinished"]
    path.write_text(json.dumps(header) + "\n" + rest)
    (loaded,) = load(tmp_path)
    assert loaded.maker is None and sort_out([loaded]) == ([loaded], [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A topic's LLM and a stack, and test sets in three languages."""
    folder = build_models(tmp_path_factory.mktemp("provenance"))
    write_topics(folder, "eng_Latn", train=8, dev=4)
    for number, language in enumerate(LANGUAGES):
        write_topics(folder, language, seed=number, test=5)
    train(stage1(folder, optim={"steps": 1}), ALONE)
    finetune(finetuning_config(folder, "sib200", optim={"steps": 1}), ALONE)
    train(stage2_config(folder, "sib200", optim={"steps": 1}), ALONE)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    """Evaluates copies of the folder's checkpoints and test sets."""
    shutil.copytree(folder / "topics", tmp_path / "topics")
    config = evaluation_config(folder, "sib200", f"sib200:{tmp_path}/topics")
    for path, name in ((*config.model.init_from, "stack"), (config.model.teacher, "llm")):
        shutil.copytree(Path(path).resolve(), tmp_path / name)
    starts, teacher = (str(tmp_path / "stack"),), str(tmp_path / "llm")
    model = replace(config.model, init_from=starts, teacher=teacher)
    options = replace(config.evaluate, systems=("llm", "stack"), results=str(tmp_path / "results"))
    return replace(config, model=model, evaluate=options)


def other_checkpoint(config: Config) -> Config:
    path = Path(*config.model.init_from) / "projection.safetensors"
    tensors = load_file(path)
    tensors["weight" if "weight" in tensors else next(iter(tensors))].view(-1)[0] += 1e-3
    save_file(tensors, path)
    return unrecorded(config)


def other_length(config: Config) -> Config:
    return replace(config, data=replace(config.data, max_length=config.data.max_length - 8))


def other_attention(config: Config) -> Config:
    config = unrecorded(config)
    return replace(config, model=replace(config.model, causal=True))


def unrecorded(config: Config) -> Config:
    """Without the record of its training a checkpoint is taken as it is."""
    (Path(*config.model.init_from) / "state.json").unlink()
    return config


def other_text(config: Config) -> Config:
    path = Path(config.task.test[0].partition(":")[2]) / "swh_Latn" / "test.tsv"
    header, *rows = csv.reader(path.open(encoding="utf-8", newline=""), delimiter="\t")
    rows[-1][2] += " or"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return config


@pytest.mark.parametrize(
    ("change", "differs", "left"),
    [
        (other_checkpoint, "checkpoint", {("stack", ("deu_Latn", "eng_Latn"))}),
        (other_length, "data.max_length", {("stack", ("deu_Latn", "eng_Latn"))}),
        (other_attention, "model.causal", {("stack", ("deu_Latn", "eng_Latn"))}),
        (other_text, "text of the test files", {("llm", ("swh_Latn",))}),
    ],
)
def test_a_table_never_mixes(
    config: Config,
    capsys,
    change: Callable[[Config], Config],
    differs: str,
    left: set[tuple[str, tuple[str, ...]]],
):
    """The stack is evaluated again in one language, after something changed."""
    evaluate(config, ALONE)
    assert "left out" not in capsys.readouterr().out
    options = replace(config.evaluate, systems=("stack",), languages=("swh_Latn",))
    evaluate(replace(change(config), evaluate=options), ALONE)
    log, results = capsys.readouterr().out, Path(config.evaluate.results)
    content = json.loads((results / "results.json").read_text())
    assert {(item["system"], tuple(item["languages"])) for item in content["left_out"]} == left
    for item in content["left_out"]:
        assert item["differs"] == differs
        named = f"{item['system']}, seed 0, sib200 in {', '.join(item['languages'])}: left out, "
        assert named in log and named in (results / "results.md").read_text()
    (table,) = content["tables"]
    missing = {(system, code) for system, codes in left for code in codes}
    for system in ("llm", "stack"):
        expected = {code for code in LANGUAGES if (system, code) not in missing}
        assert set(table["scores"][system]) & set(LANGUAGES) == expected
    assert len(load(results)) == 6  # nothing is lost


def test_a_sum_of_another_stage_1_is_another_system(
    folder: Path, config: Config, tmp_path: Path, capsys
):
    """The LLM, which is the other part of it, is the same."""
    latest = folder / "stage1" / "checkpoints" / "latest"
    part = shutil.copytree(latest.resolve(), tmp_path / "stage1")
    options = replace(config.evaluate, systems=("llm", "sum"), stage1=(str(part),))
    config = replace(config, evaluate=options)
    evaluate(config, ALONE)
    first = {item.identity: item.maker for item in load(Path(options.results))}
    evaluate(config, ALONE)
    assert "left out" not in capsys.readouterr().out
    again = {item.identity: item.maker for item in load(Path(options.results))}
    digests = [{key: each["checkpoint"] for key, each in made.items()} for made in (first, again)]
    assert digests[0] == digests[1] and len(set(digests[0].values())) == 2
    tensors = load_file(part / "projection.safetensors")
    tensors["weight"][0, 0] += 1e-3
    save_file(tensors, part / "projection.safetensors")
    (part / "state.json").unlink()
    evaluate(replace(config, evaluate=replace(options, languages=("swh_Latn",))), ALONE)
    content = json.loads((Path(options.results) / "results.json").read_text())
    (left,) = content["left_out"]
    assert (left["system"], left["languages"]) == ("sum", ["deu_Latn", "eng_Latn"])
    assert left["differs"] == "checkpoint"
    (table,) = content["tables"]
    assert set(table["scores"]["sum"]) & set(LANGUAGES) == {"swh_Latn"}
    assert set(table["scores"]["llm"]) & set(LANGUAGES) == set(LANGUAGES)
    assert "sum, seed 0, sib200 in deu_Latn, eng_Latn: left out, " in capsys.readouterr().out


def test_evaluating_the_same_again_leaves_nothing_out(config: Config):
    evaluate(config, ALONE)
    options = replace(config.evaluate, systems=("stack",), languages=("swh_Latn",))
    evaluate(replace(config, evaluate=options), ALONE)
    content = json.loads((Path(config.evaluate.results) / "results.json").read_text())
    assert content["left_out"] == [] and len(content["commits"]) == 1
    assert set(content["tables"][0]["scores"]["stack"]) >= set(LANGUAGES)


def test_what_a_translator_cut_or_never_ended_is_told_everywhere(
    config: Config, tmp_path: Path, capsys
):
    """A translator of twelve positions that has learned nothing cuts most texts and ends few."""
    translator = build_encoder(tmp_path / "translator")
    saved = json.loads((translator / "config.json").read_text())
    (translator / "config.json").write_text(json.dumps(saved | {"max_position_embeddings": 12}))
    options = {"systems": ("translate_test",), "translator": str(translator)}
    evaluate(replace(config, evaluate=replace(config.evaluate, **options)), ALONE)
    log, results = capsys.readouterr().out, Path(config.evaluate.results)
    items = {item.language: item for item in load(results)}
    assert (items["eng_Latn"].cut, items["eng_Latn"].unfinished) == (None, None)
    rows = {row["language"]: row for row in csv.DictReader((results / "results.csv").open())}
    (table,) = json.loads((results / "results.json").read_text())["tables"]
    for language in ("deu_Latn", "swh_Latn"):
        item, lines = items[language], SIB200.read(tmp_path / "topics", "test", language)
        texts = [example.text for example in lines]
        made = Translator(translator, cache=tmp_path / "cache", world=ALONE)
        counts = dict.fromkeys(TRANSLATION_COUNTS, 0)
        for text in texts:
            segments = [text[slice(*part)] for part in find_parts(text, "sentences")]
            alone = [made([segment], source=language) for segment in segments]
            counts["segments"] += len(segments)
            for name in ("cut", "unfinished"):
                flawed = sum(getattr(each, name) for each in alone)
                counts[f"{name}_segments"] += flawed
                counts[name] += flawed > 0
        assert counts | {"examples": 5} == item.translation_counts and item.cut > 0
        assert item.maker["settings"]["evaluate.translate_by"] == "sentences"
        assert table["translated"]["translate_test"][language] == {"examples": 5} | counts
        written = {name: int(rows[language][f"translate_test {name}"]) for name in counts}
        assert written == counts
        told = f"translate_test in {language}: of {item.segments} segments {item.cut_segments} cut "
        told += f"at the translator's positions, {item.unfinished_segments} translated without an "
        told += f"end; they are in {item.cut} and {item.unfinished} of 5 examples\n"
        assert told in (results / "results.md").read_text() and told in log
        assert told.replace(" in ", " of sib200 in ", 1) in log
    assert rows["eng_Latn"]["translate_test cut"] == ""
    assert "translate_test: translated sentence by sentence\n" in log


def test_nothing_behind_a_link_and_nothing_of_others_is_removed(config: Config, tmp_path: Path):
    mine = tmp_path / "mine" / "llm" / "sib200" / "deu_Latn"
    mine.mkdir(parents=True)
    (mine / "manifest.json").write_text("{}")
    results = Path(config.evaluate.results)
    results.mkdir()
    (results / "corpus").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="a link out of .*results; remove that link"):
        evaluate(config, ALONE)
    assert (mine / "manifest.json").read_text() == "{}"
    (results / "corpus").unlink()
    (tmp_path / "mine").rename(results / "corpus")
    inside = results / "corpus" / "llm" / "sib200" / "deu_Latn"
    (inside / "manifest.json").rename(inside / "thesis.tex")
    with pytest.raises(ValueError, match="deu_Latn is already there and not empty"):
        evaluate(config, ALONE)
    assert (inside / "thesis.tex").read_text() == "{}"
