"""Gradients that are not finite: no update, counted and told, nothing bad saved, exact resume."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtllm_engine.config import Config
from tests.support.poison_worker import Outcome, Run, learn_on
from tests.support.stages import rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

World = tuple[int, int]
"""Ranks, of which 0 is this process, and zero.stage."""
ALONE, ONE, SHARDED, WHOLE = (0, 0), (1, 3), (2, 3), (2, 0)
STEPS, LR = 6, 1e-3
NAN, INF = math.nan, math.inf
TWICE = {"run": {"max_bad_steps": 2}}
# A finite gradient times such a learning rate is none.
STEEP = {"optim": {"steps": STEPS, "lr": 1e308, "warmup_ratio": 0.0}}
POISON: dict[str, Mapping[int, float]] = {
    **{f"one {value}": {3: value} for value in (NAN, INF, -INF)},
    "named": {2: NAN, 5: INF},
    **dict.fromkeys(("uncut", "cut"), {3: NAN, 4: INF}),
    **dict.fromkeys(("many", "many, cut"), {1: NAN, 3: NAN, 4: NAN, 5: NAN}),
    "never": dict.fromkeys(range(1, STEPS + 1), NAN),
    "steep": {},
}
"""Step -> what a number of its gradient is, by what is learned."""
SECTIONS = {"many": TWICE, "many, cut": TWICE, "never": {"checkpoint": {"every": 3}}}
SECTIONS["steep"] = STEEP
BOTH = ["named", "uncut", "cut", "many", "many, cut", "never", "steep"]
LEARNED = {
    ALONE: [*(f"one {value}" for value in (NAN, INF, -INF)), *BOTH],
    ONE: [f"one {INF}", "named", "many", "many, cut"],
    SHARDED: [f"one {NAN}", f"one {INF}", *BOTH],
    WHOLE: [f"one {INF}", *BOTH],
}


def worlds_of(name: str) -> list[World]:
    return [world for world, names in LEARNED.items() if name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 120)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[tuple[World, str], list[Outcome]]:
    """What every world has learned, of what was cut after three steps twice."""
    found: dict[tuple[World, str], list[Outcome]] = {}
    for world, names in LEARNED.items():
        runs = [(name, run) for name in names for run in parts(folder, name, world)]
        learned = learn_on(world[0], [run for _, run in runs], folder)
        for (name, _), outcome in zip(runs, learned, strict=True):
            found.setdefault((world, name), []).append(outcome)
    return found


def parts(folder: Path, name: str, world: World) -> list[Run]:
    """A run, or its first three steps and then all of it."""
    whole = Run(configure(folder, name, world), POISON[name])
    return [whole._replace(stop_at=3), whole] if "cut" in name.split() else [whole]


def configure(folder: Path, name: str, world: World) -> Config:
    """Six steps, each of which is saved."""
    world_size, stage = world
    sections = {
        "zero": {"stage": stage},
        "optim": {"steps": STEPS, "lr": LR},
        "checkpoint": {"every": 1, "keep": 9},
        "lora": {"dropout": 0.05},
    } | SECTIONS.get(name, {})
    run = {"dir": str(folder / f"{name}-{world_size}-{stage}"), **sections.pop("run", {})}
    return build_config(folder, run=run, **sections)


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def state(config: Config, step: int) -> dict:
    return json.loads((checkpoint(config, step) / "state.json").read_text())


def training_rows(config: Config) -> list[dict]:
    return [row for row in rows(Path(config.run.dir)) if "loss" in row]


def only(outcomes: Sequence[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


@pytest.mark.parametrize(
    ("world", "value"),
    [(world, value) for value in (NAN, INF, -INF) for world in worlds_of(f"one {value}")],
)
def test_a_step_without_a_finite_gradient_makes_no_update(
    folder: Path, outcomes, world: World, value: float
):
    """Its documents and its place in the schedule are consumed, but none of AdamW's updates."""
    name = f"one {value}"
    config = configure(folder, name, world)
    assert only(outcomes[world, name]) == Outcome("", STEPS)
    for file in ("adapter_model.safetensors", "projection.safetensors", "optimizer.safetensors"):
        before, after = (load_file(checkpoint(config, step) / file) for step in (2, 3))
        assert all((before[key] == after[key]).all() for key in before)
        last = load_file(checkpoint(config, STEPS) / file)
        assert all(tensor.isfinite().all() for tensor in last.values())
        assert any((last[key] != after[key]).any() for key in last)
    states = [state(config, step) for step in range(1, STEPS + 1)]
    assert [each["updates"] for each in states] == [1, 2, 2, 3, 4, 5]
    assert [each["bad_steps"] for each in states] == [0, 0, 1, 0, 0, 0]
    assert states[1]["lanes"] != states[2]["lanes"]
    training = training_rows(config)
    assert [row["grad_norm"] is None for row in training] == [n == 3 for n in range(1, STEPS + 1)]
    assert [row["lr"] for row in training] == [LR * (STEPS - n) / STEPS for n in range(STEPS)]


def test_a_run_that_skipped_nothing_has_no_file_of_it(folder: Path, outcomes):
    sections = {"run": {"dir": str(folder / "sound")}, "zero": {"stage": 0}, "optim": {"steps": 2}}
    config = build_config(folder, **sections)
    assert only(learn_on(0, [Run(config, {})], folder)) == Outcome("", 2)
    assert not (folder / "sound" / "skipped.jsonl").exists()
    assert (folder / "named-0-0" / "skipped.jsonl").exists()


@pytest.mark.parametrize("world", worlds_of("named"))
def test_the_documents_of_a_bad_step_are_named(folder: Path, outcomes, world: World):
    config = configure(folder, "named", world)
    lines = (Path(config.run.dir) / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert [each["step"] for each in skipped] == [2, 5]
    assert all(len(each["documents"]) == 8 * 2 for each in skipped)
    keys = {document["key"] for each in skipped for document in each["documents"]}
    assert len(keys) == 2 * 8 * 2  # in one epoch each document is read once


@pytest.mark.parametrize("world", worlds_of("cut"))
def test_stopped_between_two_bad_steps_and_resumed_is_never_stopped(
    folder: Path, outcomes, world: World
):
    uncut, cut = (configure(folder, name, world) for name in ("uncut", "cut"))
    assert only(outcomes[world, "uncut"]) == Outcome("", STEPS)
    assert outcomes[world, "cut"] == [Outcome("", 3), Outcome("", STEPS)]
    assert state(cut, STEPS)["files"] == state(uncut, STEPS)["files"]
    assert [row["loss"] for row in training_rows(cut)] == [
        row["loss"] for row in training_rows(uncut)
    ]
    files = [Path(config.run.dir) / "skipped.jsonl" for config in (uncut, cut)]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("world", worlds_of("many"))
@pytest.mark.parametrize("name", ["many", "many, cut"])
def test_too_many_bad_steps_in_a_row_end_the_run(folder: Path, outcomes, world: World, name: str):
    """At the same step, also when it was stopped between the two."""
    config, (*stopped, ended) = configure(folder, name, world), outcomes[world, name]
    assert stopped == [Outcome("", 3)] * ("cut" in name)
    error = ended.error
    assert "2 steps in a row, up to 4," in error and "skipped.jsonl" in error and "\n" not in error
    assert ended.steps == 4
    latest = Path(config.run.dir) / "checkpoints" / "latest"
    assert latest.resolve() == checkpoint(config, 3)
    assert all(
        tensor.isfinite().all() for tensor in load_file(latest / "optimizer.safetensors").values()
    )


@pytest.mark.parametrize("world", worlds_of("never"))
def test_no_update_at_all_is_saved_and_told(folder: Path, outcomes, world: World):
    config = configure(folder, "never", world)
    assert only(outcomes[world, "never"]) == Outcome("", STEPS)
    assert state(config, STEPS)["updates"] == 0 and state(config, STEPS)["bad_steps"] == STEPS


@pytest.mark.parametrize("world", worlds_of("steep"))
def test_values_that_are_not_finite_are_not_saved(folder: Path, outcomes, world: World):
    config = configure(folder, "steep", world)
    error = only(outcomes[world, "steep"]).error
    assert "is not finite after step 1; lower optim.lr" in error and "\n" not in error
    assert not list((Path(config.run.dir) / "checkpoints").glob("step-*"))
