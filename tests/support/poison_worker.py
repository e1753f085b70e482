"""Trains on this rank of a world, with gradients that are not finite in some steps: `python -m
tests.support.poison_worker PATH`, the runs in PATH.json, one after another.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from mtllm_engine import train as training
from mtllm_engine.config import Config, dumps, load
from mtllm_engine.training import step as steps
from mtllm_engine.world import World, connect
from tests.support.machine import HANG_S, launch
from tests.support.stages import rows

POISONED = "projection.weight"


class Run(NamedTuple):
    """A run, or a part of one."""

    config: Config
    poison: Mapping[int, float]
    """Step -> what one number of one gradient is there, on the last rank."""
    stop_at: int = 0
    """The step that is to be the last one, if any."""


class Outcome(NamedTuple):
    """What became of a run, and how many steps its folder tells of."""

    error: str
    steps: int


def learn_on(world_size: int, runs: Sequence[Run], folder: Path) -> list[Outcome]:
    """Runs, in this process (0) or on ranks that are started once for all of them."""
    if world_size == 0:
        alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        return [_learn(run, alone) for run in runs]
    path = folder / "runs"
    for number, run in enumerate(runs):
        path.with_suffix(f".{number}.toml").write_text(dumps(run.config))
    # NaN and infinity as Python's JSON writes and reads them.
    path.with_suffix(".json").write_text(json.dumps([run[1:] for run in runs]))
    launch(world_size, "tests.support.poison_worker", path)
    return [Outcome(*each) for each in json.loads(path.with_suffix(".outcomes").read_text())]


def _learn(run: Run, world: World) -> Outcome:
    folder, error = Path(run.config.run.dir), ""
    with _poisoned(world, run, folder / "STOP"):
        try:
            training.learn(run.config, world)
        except ValueError as raised:
            error = str(raised)
    return Outcome(error, sum("loss" in row for row in rows(folder)) if world.is_main else 0)


@contextlib.contextmanager
def _poisoned(world: World, run: Run, stop: Path) -> Iterator[None]:
    number = 0
    build_engine, train_step = training.build_engine, steps.train_step

    def build_spoilt(config: Config, stack: torch.nn.Module, world: World) -> object:
        engine = build_engine(config, stack, world)
        dict(stack.named_parameters())[POISONED].register_hook(spoil)
        return engine

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if number in run.poison and world.rank == world.size - 1:
            gradient = gradient.clone()
            gradient.view(-1)[3] = run.poison[number]
        return gradient

    def counted_step(config: Config, world: World, engine, global_batch, index: int):
        nonlocal number
        number = index + 1
        if number == run.stop_at - 1 and world.is_main:
            stop.touch()  # ranks look for it when they start a step
        return train_step(config, world, engine, global_batch, index)

    with (
        mock.patch.object(training, "build_engine", build_spoilt),
        mock.patch.object(steps, "train_step", counted_step),
    ):
        yield


if __name__ == "__main__":
    path = Path(sys.argv[1])
    world = connect(timeout_s=HANG_S)
    outcomes = []
    for number, (poison, stop_at) in enumerate(json.loads(path.with_suffix(".json").read_text())):
        poison = {int(step): value for step, value in poison.items()}
        run = Run(load(path.with_suffix(f".{number}.toml")), poison, stop_at)
        outcomes.append(_learn(run, world))
    if world.is_main:
        path.with_suffix(".outcomes").write_text(json.dumps(outcomes))
    world.close()
