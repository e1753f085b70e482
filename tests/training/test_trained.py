"""What was trained, found by each of its names; what is damaged, half copied or none is refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mtllm_engine import MTLLM, files
from mtllm_engine.config import LORA_TARGETS, Config
from mtllm_engine.tasks.nli import LABELS
from mtllm_engine.training.checkpoint import fingerprint_of
from mtllm_engine.training.origins import add_up
from mtllm_engine.training.trained import EXPORTED, Head, find_trained, head_of
from tests.support.adapters import seal, write_head, write_run
from tests.support.recipes import error_of
from tests.support.tiny import build_config, build_decoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
FALLBACK = {"min_Arab": "ind_Latn"}
NAMES = ("latest", "step-00000001")
READ = {"max_length": 40, "truncation": "independent", "parts": "lines"}
"""Of stage 1 and 2, what is none of the defaults."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe's folder: stage 1, a fine-tuned LLM, stage 2."""
    folder = tmp_path_factory.mktemp("trained")
    build_encoder(folder / "encoder", width=16, layers=1)
    build_decoder(folder / "decoder", width=32, layers=1)
    write_run(configure(folder, "stage1"), seed=1)
    lora = {"rank": 3, "alpha": 1.0, "rslora": True, "target_modules": ["up_proj", "q_proj"]}
    finetuning = {"objective": {"kind": "finetune", "reader": "llm"}, "lora": lora}
    finetuning["data"] = {"train": []}
    write_run(configure(folder, "finetune", task="nli", **finetuning), outputs=3, seed=2)
    model = {"teacher": str(latest(folder / "finetune"))}
    write_run(configure(folder, "stage2", task="nli", model=model), outputs=3, seed=3)
    return folder


def configure(folder: Path, name: str, *, task: str = "", **sections: Any) -> Config:
    models = {key: str(folder / key) for key in ("encoder", "decoder")}
    models |= {"causal": True, "projection_bias": False, "dtype": "float32"}
    options: dict[str, Any] = {"run": {"dir": str(folder / name)}}
    options["model"] = models | sections.pop("model", {})
    data = {"train": [str(folder / "none")], "pack_documents": 1}
    options["data"] = data | READ | sections.pop("data", {})
    options["languages"] = {"fallback": FALLBACK}
    if task:
        options["task"] = {"name": task, "train": f"mnli:{folder}"}
    return build_config(folder, **options, **sections)


def latest(run: Path) -> Path:
    return run / "checkpoints" / "latest"


def step(run: Path, number: int = 1) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def add_step(run: Path, number: int, score: float | None) -> Path:
    """One more checkpoint of a run, the latest then."""
    added = shutil.copytree(step(run), step(run, number))
    record = json.loads((added / "state.json").read_text())
    del record["sha256"]
    seal(added, record | {"step": number, "score": score})
    files.link(latest(run), added.name)
    return added


@pytest.mark.parametrize("name", ["stage1", *(f"stage1/checkpoints/{each}" for each in NAMES)])
def test_stage_1_is_a_run_or_a_checkpoint(recipe: Path, name: str):
    found = find_trained(recipe / name)
    assert found.name == str(recipe / name)
    assert found.folder.samefile(step(recipe / "stage1")) and found.student == found.folder
    assert found.run is not None and found.run.samefile(recipe / "stage1")
    assert found.reads_stack and not found.is_exported
    assert (found.head, found.task, found.tasks) == (None, "", {})
    model, data = found.config.model, found.config.data
    assert (model.encoder, model.decoder) == (str(recipe / "encoder"), str(recipe / "decoder"))
    assert (model.causal, model.projection_bias, model.dtype) == (True, False, "float32")
    assert (model.teacher, model.init_from) == ("", (str(found.folder),))
    assert {key: getattr(data, key) for key in READ} == READ
    assert found.config.languages.fallback == FALLBACK
    lora = found.config.lora
    assert (lora.rank, lora.alpha, {*lora.target_modules}) == (4, 8.0, {*LORA_TARGETS})


def test_a_name_may_be_a_text_and_begin_at_home(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(recipe))
    assert find_trained("~/stage1").folder == find_trained(recipe / "stage1").folder


def test_stage_2_names_its_task_and_its_teacher(recipe: Path):
    """A recipe's folder is its stage 2."""
    for name in ("stage2", "."):
        found = find_trained(recipe / name)
        assert found.student.samefile(step(recipe / "stage2"))
        assert Path(found.config.model.teacher).samefile(step(recipe / "finetune"))
        assert found.task == "nli" and found.reads_stack
        assert found.head == Head(kind="classification", num_outputs=3, labels=LABELS)


def test_a_recipe_without_stage_2_is_its_stage_1(recipe: Path, tmp_path: Path):
    for name in ("encoder", "decoder", "stage1", "finetune"):
        (tmp_path / name).symlink_to(recipe / name)
    assert find_trained(tmp_path).student.samefile(step(recipe / "stage1"))
    for seed in (3, 4):
        shutil.copytree(recipe / "stage2", tmp_path / f"stage2-{seed}", symlinks=True)
        if seed == 3:
            assert find_trained(tmp_path).student.samefile(step(tmp_path / "stage2-3"))
    message = error_of(lambda: find_trained(tmp_path))
    assert "several stacks" in message
    assert f"{tmp_path / 'stage2-3'}, {tmp_path / 'stage2-4'}" in message
    assert find_trained(tmp_path / "stage2-4").task == "nli"


def test_a_fine_tuned_llm_has_no_projection(recipe: Path):
    found = find_trained(recipe / "finetune")
    assert not found.reads_stack and found.head and found.head.kind == "classification"
    lora = found.config.lora
    assert (lora.rank, lora.alpha, lora.rslora) == (3, 1.0, True)
    assert {*lora.target_modules} == {"up_proj", "q_proj"}


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:
    """A copy of stage 1."""
    return shutil.copytree(recipe / "stage1", tmp_path / "run", symlinks=True)


def test_of_a_run_it_is_the_best_checkpoint_or_else_the_latest(run: Path):
    add_step(run, 2, None)
    assert find_trained(run).folder.samefile(step(run, 2))
    add_step(run, 3, 0.5)
    add_step(run, 4, 0.25)
    assert find_trained(run).folder.samefile(step(run, 3))
    assert find_trained(latest(run)).folder.samefile(step(run, 4))


def test_links_that_a_copy_made_folders_or_lost_are_understood(recipe: Path, run: Path):
    """rsync -L and scp -r make folders of them, others leave them out."""
    expected = find_trained(recipe / "stage1")
    add_step(run, 2, None)
    latest(run).unlink()
    assert find_trained(run).folder.samefile(step(run, 2))
    shutil.copytree(step(run, 2), latest(run))
    for folder in (run, latest(run), step(run, 2)):
        found = find_trained(folder)
        assert found.record["step"] == 2 and found.run == run.resolve()
    shutil.rmtree(step(run, 2))
    shutil.rmtree(step(run, 1))
    found = find_trained(run)
    assert found.folder.samefile(latest(run)) and found.reads_stack
    assert found.config.lora == expected.config.lora


def test_a_teacher_whose_link_became_a_folder_is_still_the_one_meant(recipe: Path, tmp_path: Path):
    copied = shutil.copytree(recipe, tmp_path / "copy")  # follows links
    for path in copied.glob("*/config.toml"):
        path.write_text(path.read_text().replace(str(recipe), str(copied)))
    found = find_trained(copied)
    teacher = Path(found.config.model.teacher)
    assert teacher.is_relative_to(copied) and (teacher / "adapter_model.safetensors").is_file()


def test_a_sum_reads_as_its_stack_and_knows_its_task(recipe: Path, tmp_path: Path):
    parts = [str(step(recipe / name)) for name in ("stage1", "finetune")]
    for number, order in enumerate((parts, parts[::-1])):
        add_up(order, tmp_path / f"sum{number}")
        found = find_trained(tmp_path / f"sum{number}")
        assert found.student == tmp_path / f"sum{number}" and found.reads_stack
        assert Path(found.config.model.teacher).samefile(parts[1])
        assert found.task == "nli" and found.head and found.head.labels == LABELS
        assert found.config.lora.rank == 7
        assert {key: getattr(found.config.data, key) for key in READ} == READ


def test_a_sum_far_from_its_parts_says_itself_how_texts_are_read(recipe: Path, tmp_path: Path):
    parts = [shutil.copytree(recipe / name, tmp_path / name) for name in ("stage1", "finetune")]
    add_up([str(step(part)) for part in parts], tmp_path / "sum")
    for part in parts:
        shutil.rmtree(part)
    models = {key: str(recipe / key) for key in ("encoder", "decoder")}
    found = find_trained(tmp_path / "sum", **models)
    assert {key: getattr(found.config.data, key) for key in READ} == READ
    assert not found.config.model.projection_bias
    assert found.task == "nli" and found.head and found.head.labels == LABELS
    # Its teacher is not there, and is no bare LLM.
    assert str(parts[1]) in found.without_teacher
    model = MTLLM.from_pretrained(tmp_path / "sum", **models)
    assert model.classify(["a b"], "swh_Latn").names == LABELS
    assert str(parts[1]) in error_of(lambda: model.encode(["a b"], reader="teacher"))


def test_a_checkpoint_without_its_run_needs_its_models_named(recipe: Path, tmp_path: Path):
    alone = shutil.copytree(step(recipe / "stage1"), tmp_path / "alone")
    message = error_of(lambda: find_trained(alone))
    assert str(alone) in message and "encoder= and decoder=" in message
    models = {key: str(recipe / key) for key in ("encoder", "decoder")}
    found = find_trained(alone, **models)
    model, data = found.config.model, found.config.data
    assert {key: getattr(model, key) for key in models} == models and found.run is None
    # How a text is read its record says.
    assert (model.causal, model.projection_bias, model.dtype) == (True, False, "float32")
    assert {key: getattr(data, key) for key in READ} == READ


def test_the_teacher_of_a_checkpoint_without_its_run_is_no_bare_llm(recipe: Path, tmp_path: Path):
    alone = shutil.copytree(step(recipe / "stage2"), tmp_path / "alone")
    record = json.loads((alone / "state.json").read_text())
    del record["sha256"]
    identity = record["identity"] | {"model.teacher": "of its adapters"}
    seal(alone, record | {"identity": identity})
    models = {key: str(recipe / key) for key in ("encoder", "decoder")}
    assert str(alone / "teacher") in find_trained(alone, **models).without_teacher
    shutil.copytree(step(recipe / "finetune"), alone / "teacher")
    assert not find_trained(alone, **models).without_teacher


def test_models_may_be_named(recipe: Path):
    """Each alone; what is not named is where it was."""
    found = find_trained(recipe / "stage1", encoder="elsewhere")
    model = found.config.model
    assert (model.encoder, model.decoder) == ("elsewhere", str(recipe / "decoder"))


def refused(recipe: Path, tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    """Names, and what is said."""
    cases: dict[str, tuple[Path | str, str]] = {}
    (tmp_path / "empty").mkdir()
    cases["a folder of nothing"] = (tmp_path / "empty", "empty is neither a run, a checkpoint nor")
    cases["a model"] = (recipe / "decoder", "decoder is neither a run, a checkpoint nor")
    cases["nowhere"] = (tmp_path / "gone", "gone is neither a folder nor a model")
    (tmp_path / "english.txt").write_text("a text\n")
    cases["a text"] = (tmp_path / "english.txt", "english.txt is a file, and no run, checkpoint")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text("{}")
    cases["a corpus"] = (tmp_path / "corpus", "corpus is a corpus .* `mtllm shards show .*/corpus`")
    cases["a misspelled run"] = ("runs/mne", "^there is no folder runs/mne, and no such model in")
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    shutil.copy(recipe / "stage1" / "config.toml", bare)
    cases["a run that saved nothing"] = (bare, "bare has no complete checkpoint yet")
    half = shutil.copytree(recipe / "stage1", tmp_path / "half", symlinks=True)
    (step(half) / "projection.safetensors").unlink()
    cases["half a checkpoint"] = (half, "is not a complete checkpoint.*copy it again")
    for name in ("adapter_model.safetensors", "projection.safetensors", "adapter_config.json"):
        damaged = shutil.copytree(recipe / "stage1", tmp_path / name, symlinks=True)
        content = (step(damaged) / name).read_bytes()
        (step(damaged) / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        cases[f"a damaged {name}"] = (damaged, f"{name} is damaged; copy it again")
    damaged = shutil.copytree(recipe / "stage1", tmp_path / "record", symlinks=True)
    (step(damaged) / "state.json").write_bytes(b"{}")
    cases["a damaged record"] = (step(damaged), "state.json is damaged; copy it again")
    return cases


def test_what_is_none_or_damaged_is_one_line(recipe: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = {}
    for case, (name, message) in refused(recipe, tmp_path).items():
        try:
            said = error_of(partial(find_trained, name))
        except pytest.fail.Exception:
            said = "it was not refused"
        if not re.search(message, said):
            wrong[case] = said
    assert not wrong


def test_heads_are_told_by_their_task(tmp_path: Path):
    """And those of no family are classifications."""
    expected = {
        ("nli", 3): Head(kind="classification", num_outputs=3, labels=LABELS),
        ("belebele", 1): Head(kind="choice", num_outputs=4),
        ("xquad", 2): Head(kind="span", num_outputs=2),
        ("mine", 2): Head(kind="classification", num_outputs=2, labels=("0", "1")),
    }
    for (task, outputs), head in expected.items():
        folder = tmp_path / task
        folder.mkdir()
        write_head(folder, outputs, 8)
        assert head_of(folder, task) == head
        names = [f"class {number}" for number in range(outputs)]
        if head.kind == "classification":
            assert head_of(folder, task, names) == replace(head, labels=tuple(names))
            wrong = [*names, "one more"]
            assert f"{outputs + 1} labels" in error_of(partial(head_of, folder, task, wrong))
    for task in ("nli", "belebele", "xquad"):
        write_head(tmp_path / task, 5, 8)
        assert "5 outputs" in error_of(partial(head_of, tmp_path / task, task))


@pytest.fixture
def exported(recipe: Path, tmp_path: Path) -> Path:
    """Stage 2 as a folder that needs nothing else, with one more task beside its own."""
    out = tmp_path / "exported"
    for name, source in {
        "encoder": recipe / "encoder",
        "llm": recipe / "decoder",
        "student": step(recipe / "stage2"),
        "teacher": step(recipe / "finetune"),
        "tasks/again": step(recipe / "finetune"),
    }.items():
        shutil.copytree(source, out / name, ignore=shutil.ignore_patterns("state.json"))
    reads = {"model.causal": True, "model.dtype": "float32", "model.projection_bias": False}
    reads |= {f"data.{key}": value for key, value in READ.items()}
    reads["languages.fallback"] = FALLBACK
    head = {"kind": "classification", "num_outputs": 3, "labels": list(LABELS)}
    paths = [path for path in out.rglob("*") if path.is_file()]
    written = {
        str(path.relative_to(out)): {
            "bytes": path.stat().st_size,
            "sha256": files.sha256_of(path),
        }
        for path in paths
    }
    decoder = fingerprint_of(str(recipe / "decoder"))
    record = {"reads": reads, "task": "nli", "tasks": {"nli": head, "again": head}}
    record |= {"files": written, "about": {"licences": {"nllb": "CC-BY-NC-4.0"}}}
    record["identity"] = {"model.causal": True, "model.decoder": decoder}
    (out / EXPORTED).write_bytes(files.sealed(record))
    return out


def test_an_exported_folder_reads_as_what_it_was_made_of(recipe: Path, exported: Path):
    found, of_run = find_trained(exported), find_trained(recipe / "stage2")
    assert found.is_exported and found.reads_stack and found.run is None
    assert found.config.lora == of_run.config.lora
    assert found.config.data == replace(
        of_run.config.data, train=found.config.data.train, lanes=found.config.data.lanes
    )
    assert found.config.languages == of_run.config.languages
    for key in ("causal", "projection_bias", "dtype"):
        assert getattr(found.config.model, key) == getattr(of_run.config.model, key)
    model = found.config.model
    assert (model.encoder, model.decoder) == (str(exported / "encoder"), str(exported / "llm"))
    assert (model.init_from, model.teacher) == (
        (str(exported / "student"),),
        str(exported / "teacher"),
    )
    assert (found.task, found.head) == ("nli", of_run.head)
    assert found.tasks == {"again": exported / "tasks" / "again"}


@pytest.mark.parametrize("name", ["llm/model.safetensors", "student/projection.safetensors"])
def test_a_half_copied_export_is_refused(exported: Path, name: str):
    path, content = exported / name, (exported / name).read_bytes()
    changes: dict[str, Callable[[], object]] = {
        f"{name} has {len(content) - 1} bytes": lambda: os.truncate(path, len(content) - 1),
        f"{name} is damaged": lambda: path.write_bytes(content[:-1] + b"\0"),
        f"{name} is missing": path.unlink,
    }
    assert content[-1]  # is another byte then
    for message, change in changes.items():
        path.write_bytes(content)
        change()
        said = error_of(lambda: find_trained(exported))
        assert message in said and "copy or download the folder again" in said
    path.write_bytes(content)
    find_trained(exported)
    record = exported / EXPORTED
    record.write_bytes(record.read_bytes().replace(b"true", b"null", 1))
    assert f"{record} is damaged" in error_of(lambda: find_trained(exported))


def test_vectors_have_the_name_of_all_that_they_depend_on(recipe: Path, run: Path, exported: Path):
    """Whatever it is called and wherever it lies; another checkpoint's have another."""
    alike = [find_trained(name).identity for name in (recipe / "stage1", run, latest(run))]
    assert len({*alike}) == 1
    others = [find_trained(name).identity for name in (recipe / "stage2", exported)]
    assert len({*alike, *others}) == 3
    found = find_trained(run)
    for section, keys in {
        "data": {"max_length": 39, "parts": "whole"},
        "model": {"dtype": "bfloat16", "quantization": "nf4", "causal": False},
    }.items():
        for key, value in keys.items():
            part = replace(getattr(found.config, section), **{key: value})
            changed = replace(found, config=replace(found.config, **{section: part}))
            assert changed.identity != found.identity, key
