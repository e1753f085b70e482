"""The Slurm scripts under a fake Slurm that starts real ranks: warned, stopped, put back, done."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mtllm_engine.config import Config, dumps
from mtllm_engine.train import train
from tests.support.fake_slurm import JOB, SCRIPTS, install, submit
from tests.support.machine import ROOT
from tests.support.stages import losses, rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

STEPS = 40
TRAINING = ["train.sbatch", "train_multinode.sbatch"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Path:
    """The commands, tiny models, a corpus, a config, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("slurm")
    install(folder)
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 60)
    train(configure(folder, "undisturbed", stage=0), build_world())
    (folder / "config.toml").write_text(dumps(configure(folder, "unnamed", stage=3)))
    return folder


def configure(folder: Path, name: str, *, stage: int) -> Config:
    sections = {
        "run": {"dir": str(folder / name)},
        "optim": {"steps": STEPS, "lr": 1e-3},
        "zero": {"stage": stage},
    }
    return build_config(folder, **sections)


@pytest.mark.parametrize("script", TRAINING)
def test_a_warned_job_stops_in_order_and_is_continued_to_its_end(slurm: Path, script: str):
    run = slurm / f"run of {script}"
    config = [str(slurm / "config.toml"), f"run.dir={run}"]
    done = submit(slurm, script, *config, METRICS=str(run / "metrics.jsonl"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (slurm / "requeued").read_text() == f"{JOB}\n"
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(slurm / "undisturbed"), rel=1e-5)
    assert not (run / "STOP").exists()


@pytest.mark.parametrize("script", TRAINING)
def test_a_mistake_in_the_config_ends_the_job_at_once(slurm: Path, script: str):
    done = submit(slurm, script, str(slurm / "config.toml"), "optim.lrr=1")
    assert done.returncode != 0
    assert "did you mean optim.lr?" in done.stderr and "Traceback" not in done.stderr
    assert not (slurm / "requeued").exists() and not (slurm / "unnamed").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_shellcheck_finds_nothing(script: str):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "-x", f"configs/slurm/{script}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
