"""Gradients that are not finite: no update, counted and told, nothing bad saved, exact resume."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtllm_engine.config import Config
from tests.support.poison_worker import learn_on
from tests.support.stages import rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE, SHARED, WHOLE = (0, 0), (2, 3), (2, 0)  # ranks, of which 0 is this process; zero.stage
WORLDS = [ALONE, (1, 3), SHARED]
STEPS, LR = 6, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 120)
    return folder


def configure(folder: Path, name: str, world: tuple[int, int], **sections) -> Config:
    """Six steps, each of which is saved."""
    world_size, stage = world
    options = {"zero": {"stage": stage}, "optim": {"steps": STEPS, "lr": LR}}
    options |= {"checkpoint": {"every": 1, "keep": 9}, "lora": {"dropout": 0.05}}
    run = {"dir": str(folder / f"{name}-{world_size}-{stage}"), **sections.pop("run", {})}
    return build_config(folder, run=run, **options | sections)


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def state(config: Config, step: int) -> dict:
    return json.loads((checkpoint(config, step) / "state.json").read_text())


def training_rows(config: Config) -> list[dict]:
    return [row for row in rows(Path(config.run.dir)) if "loss" in row]


@pytest.mark.parametrize(
    ("world", "value"),
    [
        (ALONE, math.nan),
        (ALONE, math.inf),
        (ALONE, -math.inf),
        ((1, 3), math.inf),
        (SHARED, math.nan),
        (WHOLE, math.inf),
    ],
)
def test_a_step_without_a_finite_gradient_makes_no_update(
    folder: Path, world: tuple[int, int], value: float
):
    """Its documents and its place in the schedule are consumed, but none of AdamW's updates."""
    config = configure(folder, f"one-{value}", world)
    assert learn_on(world[0], config, {3: value}) == ""
    for name in ("adapter_model.safetensors", "projection.safetensors", "optimizer.safetensors"):
        before, after = (load_file(checkpoint(config, step) / name) for step in (2, 3))
        assert all((before[key] == after[key]).all() for key in before)
        last = load_file(checkpoint(config, STEPS) / name)
        assert all(tensor.isfinite().all() for tensor in last.values())
        assert any((last[key] != after[key]).any() for key in last)
    states = [state(config, step) for step in range(1, STEPS + 1)]
    assert [each["updates"] for each in states] == [1, 2, 2, 3, 4, 5]
    assert [each["bad_steps"] for each in states] == [0, 0, 1, 0, 0, 0]
    assert states[1]["lanes"] != states[2]["lanes"]
    training = training_rows(config)
    assert [row["grad_norm"] is None for row in training] == [n == 3 for n in range(1, STEPS + 1)]
    assert [row["lr"] for row in training] == [LR * (STEPS - n) / STEPS for n in range(STEPS)]


def test_a_run_that_skipped_nothing_has_no_file_of_it(folder: Path):
    config = configure(folder, "sound", ALONE, optim={"steps": 2})
    assert learn_on(0, config, {}) == "" and len(training_rows(config)) == 2
    assert not (Path(config.run.dir) / "skipped.jsonl").exists()


@pytest.mark.parametrize("world", WORLDS)
def test_the_documents_of_a_bad_step_are_named(folder: Path, world: tuple[int, int]):
    config = configure(folder, "named", world)
    learn_on(world[0], config, {2: math.nan, 5: math.inf})
    lines = (Path(config.run.dir) / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert [each["step"] for each in skipped] == [2, 5]
    assert all(len(each["documents"]) == 8 * 2 for each in skipped)
    keys = {document["key"] for each in skipped for document in each["documents"]}
    assert len(keys) == 2 * 8 * 2  # in one epoch each document is read once


@pytest.mark.parametrize("world", [ALONE, SHARED, WHOLE])
def test_stopped_between_two_bad_steps_and_resumed_is_never_stopped(
    folder: Path, world: tuple[int, int]
):
    poison = {3: math.nan, 4: math.inf}
    whole, cut = (configure(folder, name, world) for name in ("whole", "cut"))
    assert learn_on(world[0], whole, poison) == ""
    assert learn_on(world[0], cut, poison, stop_at=3) == ""
    assert len(training_rows(cut)) == 3 and learn_on(world[0], cut, poison) == ""
    assert state(cut, STEPS)["files"] == state(whole, STEPS)["files"]
    assert [row["loss"] for row in training_rows(cut)] == [
        row["loss"] for row in training_rows(whole)
    ]
    files = [Path(config.run.dir) / "skipped.jsonl" for config in (whole, cut)]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stop_at", [0, 3])
def test_too_many_bad_steps_in_a_row_end_the_run(
    folder: Path, world: tuple[int, int], stop_at: int
):
    """At the same step, also when it was stopped between the two."""
    limits = {"run": {"max_bad_steps": 2}}
    config = configure(folder, f"many-{stop_at}", world, **limits)
    poison = {1: math.nan, 3: math.nan, 4: math.nan, 5: math.nan}
    if stop_at:
        assert learn_on(world[0], config, poison, stop_at=stop_at) == ""
    error = learn_on(world[0], config, poison)
    assert "2 steps in a row, up to 4," in error and "skipped.jsonl" in error and "\n" not in error
    assert len(training_rows(config)) == 4
    latest = Path(config.run.dir) / "checkpoints" / "latest"
    assert latest.resolve() == checkpoint(config, 3)
    assert all(
        tensor.isfinite().all() for tensor in load_file(latest / "optimizer.safetensors").values()
    )


@pytest.mark.parametrize("world", [ALONE, SHARED])
def test_no_update_at_all_is_saved_and_told(folder: Path, world: tuple[int, int]):
    config = configure(folder, "never", world, checkpoint={"every": 3})
    assert learn_on(world[0], config, dict.fromkeys(range(1, STEPS + 1), math.nan)) == ""
    assert state(config, STEPS)["updates"] == 0 and state(config, STEPS)["bad_steps"] == STEPS


@pytest.mark.parametrize("world", [ALONE, SHARED])
def test_values_that_are_not_finite_are_not_saved(folder: Path, world: tuple[int, int]):
    """A finite gradient times such a learning rate is none."""
    optim = {"steps": STEPS, "lr": 1e308, "warmup_ratio": 0.0}
    config = configure(folder, "steep", world, optim=optim)
    error = learn_on(world[0], config, {})
    assert "is not finite after step 1; lower optim.lr" in error and "\n" not in error
    assert not list((Path(config.run.dir) / "checkpoints").glob("step-*"))
