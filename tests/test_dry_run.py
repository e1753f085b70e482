"""A dry run: one step on what is really there, what it took, and nothing left behind."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtllm_engine.config import Config, dumps
from mtllm_engine.dry_run import dry_run
from mtllm_engine.train import train
from tests.support.machine import ROOT
from tests.support.stages import (
    ALONE,
    build_models,
    finetuning_config,
    losses,
    stage1_config,
    write_topics,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = build_models(tmp_path_factory.mktemp("models"))
    write_topics(folder, "eng_Latn", train=12, dev=4)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def configs(folder: Path) -> dict[str, Config]:
    return {"train": stage1_config(folder), "finetune": finetuning_config(folder, "sib200")}


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_one_step_leaves_nothing(folder: Path, kind: str, capsys):
    config, before = configs(folder)[kind], contents(folder)
    dry_run(config, ALONE)
    assert contents(folder) == before and not list(folder.glob(".*"))
    out = capsys.readouterr().out
    assert f"run         {config.run.dir}\n" in out and "dry-" not in out
    assert re.search(r"^dry run +one step of 3, on 1 x cpu$", out, re.M)
    assert re.search(r"^time +[\d.]+ s until the step, [\d.]+ s for it: [\d,]+ pairs/s$", out, re.M)
    assert re.search(
        r"^memory +at most [\d.]+ GB of each process, .*; estimated [\d.]+ MB:$", out, re.M
    )
    assert re.search(r"^  LLM's linears +[\d.]+ MB  [\d,]+ weights, float32$", out, re.M)


def test_its_step_is_a_runs_first(folder: Path, capsys):
    config = stage1_config(folder)
    dry_run(config, ALONE)
    loss = float(re.search(r"^result +loss ([\d.]+),", capsys.readouterr().out, re.M)[1])
    train(config, ALONE)
    assert loss == pytest.approx(losses(Path(config.run.dir))[0], rel=1e-3)
    before = contents(folder)
    dry_run(config, ALONE)  # beside a run that is there
    assert contents(folder) == before


def test_what_breaks_leaves_nothing_either(folder: Path):
    config = finetuning_config(folder, "sib200", zero={"stage": 0}, data={"lanes": 13})
    with pytest.raises(ValueError, match="fewer than data.lanes=13"):
        dry_run(config, ALONE)
    assert not list(folder.glob(".*"))


def test_two_ranks_by_the_command(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    run = {"dir": str(tmp_path / "deep" / "run")}
    path.write_text(dumps(stage1_config(folder, run=run, zero={"stage": 3})))
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", str(path), "--dry-run"]
    command += ["--gpus", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one step of 3, on 2 x cpu" in done.stdout and "gathered weights" in done.stdout
    assert list(tmp_path.iterdir()) == [path]
