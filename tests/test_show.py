"""`mtllm show X`: what it says of runs, checkpoints, sums and exported folders, and of others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtllm_engine.cli import main
from mtllm_engine.export import export
from mtllm_engine.finetune import finetune
from mtllm_engine.show import show
from mtllm_engine.train import train
from mtllm_engine.training.origins import add_up
from mtllm_engine.training.trained import EXPORTED
from tests.support.machine import ROOT
from tests.support.stages import (
    ALONE,
    build_models,
    checkpoint,
    finetuning_config,
    rows,
    stage1_config,
    write_topics,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = "science/technology, travel, politics, sports, health, entertainment, geography"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Stage 1 with a fallback, an LLM fine-tuned on topics, their sum, and exports; in the end the
    encoder has a licence, and neither it nor the LLM any weights."""
    folder = build_models(tmp_path_factory.mktemp("show"))
    write_topics(folder, "eng_Latn", train=12, dev=4)
    languages = {"fallback": {"min_Arab": "ind_Latn"}}
    train(stage1_config(folder, languages=languages), ALONE)
    finetune(finetuning_config(folder, "sib200"), ALONE)
    parts = [checkpoint(folder, "stage1", "latest"), checkpoint(folder, "finetune-sib200")]
    add_up(list(map(str, parts)), folder / "sum")
    (folder / "encoder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    topics = {"topics": folder / "finetune-sib200"}
    export(folder / "stage1", folder / "exported", tasks=topics)
    export(folder / "stage1", folder / "merged", merge=True)
    for name in ("encoder", "decoder"):
        (folder / name / "model.safetensors").unlink()
    return folder


@pytest.fixture
def exported(models: Path, tmp_path: Path) -> Path:
    """A copy of an exported folder."""
    return Path(shutil.copytree(models / "exported", tmp_path / "exported"))


def shown(name: Path) -> dict[str, str]:
    """The table's values by name; it fits a screen."""
    lines = show(str(name)).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 180
    return {key: value.strip() for key, _, value in (line.partition("  ") for line in lines)}


def test_a_run_of_stage_1(models: Path):
    table = shown(models / "stage1")
    assert table["is"] == f"checkpoint step-00000003 of the run {models}/stage1"
    assert table["learned"] == "the stack from the bare LLM"
    assert table["encoder"] == f"{models}/encoder, licence cc-by-nc-4.0"
    assert table["LLM"] == f"{models}/decoder, licence unknown, bidirectional, float32"
    first = "ace_Arab, ace_Latn, acm_Arab, acq_Arab, aeb_Arab, afr_Latn, ..."
    assert table["languages"] == f"203: {first}; min_Arab as ind_Latn"
    assert table["texts"] == "read whole, up to 64 tokens, aligned truncation"
    assert table["adapters"].startswith("rank 4, alpha 8 on q_proj, k_proj, ")
    assert table["steps"] == "3 of 3" and "task" not in table
    flops = sum(row["flops"] for row in rows(models / "stage1") if "loss" in row)
    assert table["cost"].endswith(f" GPU-hours, {flops:.3g} FLOPs")
    assert "commit" in table and table["size"].endswith("B)")


def test_a_fine_tuned_llm_and_what_was_measured(models: Path):
    table = shown(models / "finetune-sib200")
    assert table["learned"] == "the LLM, sib200 in English"
    assert table["task"] == f"sib200 classification into 7: {LABELS}"
    assert "encoder" not in table and "languages" not in table
    step = int(table["steps"].partition(" ")[0])
    measured = [row for row in rows(models / "finetune-sib200") if "validation_accuracy" in row]
    (accuracy,) = [row["validation_accuracy"] for row in measured if row["step"] == step]
    assert table["validation"].startswith(f"step {step}, accuracy {accuracy:.4g}, ")


def test_a_checkpoint_is_shown_as_its_run_is(models: Path):
    checkpoints = models / "stage1" / "checkpoints"
    assert shown(checkpoints / "latest") == shown(models / "stage1")
    assert shown(checkpoints / "step-00000003") == shown(models / "stage1")


def test_a_sum(models: Path):
    table = shown(models / "sum")
    assert table["is"] == f"a sum, {models}/sum"
    for number, run in enumerate(("stage1", "finetune-sib200"), start=1):
        assert table[f"part {number}"].startswith(f"{models}/{run}/checkpoints/step-")
    assert table["adapters"].startswith("rank 8, alpha 16 on ")
    assert table["task"] == f"sib200 classification into 7: {LABELS}"
    hours = [float(shown(models / run)["cost"].split()[0]) for run in ("stage1", "finetune-sib200")]
    assert float(table["cost"].split()[0]) == pytest.approx(sum(hours), rel=0.02)


def test_an_exported_folder(models: Path, exported: Path):
    table = shown(exported)
    assert table["is"] == f"an exported folder, {exported}"
    assert table["encoder"] == "encoder, licence cc-by-nc-4.0"
    assert table["LLM"] == "decoder, licence unknown, bidirectional, float32"
    assert table["task topics"] == f"classification into 7: {LABELS}"
    assert table["run 1"].startswith("distillation from the bare LLM (stage 1), 3 steps; commit ")
    for name in ("languages", "texts", "adapters", "projection"):
        assert table[name] == shown(models / "stage1")[name]


def test_adapters_in_the_weights_are_none(models: Path, exported: Path):
    table = shown(models / "merged")
    assert table["adapters"] == "merged into the LLM's weights"
    assert table["run 1"] == shown(exported)["run 1"]


@pytest.mark.parametrize("name", ["absent/at all", "models", "half", "damaged"])
def test_what_is_no_such_thing_is_one_line(name: str, models, exported, tmp_path, capfd):
    reason = {
        "absent/at all": "absent/at all is neither a folder nor a model",
        "models": f"{models}/encoder is neither a run, a checkpoint nor an exported folder",
        "half": f"{exported} is not complete: student/projection.safetensors is missing",
        "damaged": f"{exported}/mtllm.json is damaged; copy or download the folder again",
    }[name]
    if name == "half":
        (exported / "student" / "projection.safetensors").unlink()
    if name == "damaged":
        os.truncate(exported / EXPORTED, 100)
    asked = {"absent/at all": name, "models": models / "encoder"}.get(name, exported)
    assert main(["show", str(asked)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"mtllm: error: {reason}") and err.count("\n") == 1


def test_an_encoder_that_is_not_there_is_no_obstacle(models: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "metrics.jsonl", "environment.json"):
        text = (models / "stage1" / name).read_text()
        (run / name).write_text(text.replace(f"{models}/encoder", "nobody/has-this"))
    saved = checkpoint(models, "stage1", "latest").resolve()
    shutil.copytree(saved, run / "checkpoints" / saved.name)
    table = shown(run)
    assert table["languages"] == "not known: nobody/has-this is not on this machine"


def test_help_and_mistakes_import_no_torch(models: Path, tmp_path: Path):
    """A command line answers at once, where nothing is loaded."""
    program = """
import json, sys
from mtllm_engine.cli import main
statuses = []
for words in (["--help"], ["encode", "--help"], ["encode", "a", "--model", "x", "--out", "a.csv"]):
    try:
        statuses.append(main(words))
    except SystemExit as left:
        statuses.append(left.code)
print(json.dumps([statuses, sorted({"torch", "transformers", "pyarrow"} & set(sys.modules))]))
"""
    command = [sys.executable, "-c", program]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=paths, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0, 1], []]
