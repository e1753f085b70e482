"""Trains on this rank of a world, with gradients that are not finite in some steps: `python -m
tests.support.poison_worker PATH`, a configuration in PATH.toml, its poison in PATH.json.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import torch

from mtllm_engine import train as training
from mtllm_engine.config import Config, dumps, load
from mtllm_engine.training import step as steps
from mtllm_engine.world import World, connect
from tests.support.machine import HANG_S, launch

POISONED = "projection.weight"


def learn_on(
    world_size: int, config: Config, poison: Mapping[int, float], *, stop_at: int = 0
) -> str:
    """A run, in this process (0) or on ranks of their own; returns its error, if it has one.

    Args:
        poison: Step -> what one number of one gradient is there, on the last rank.
        stop_at: The step that is to be the last one, if any.
    """
    if world_size == 0:
        alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        return _learn(config, alone, poison, stop_at)
    path = Path(f"{config.run.dir}.toml")
    path.write_text(dumps(config))
    # NaN and infinity as Python's JSON writes and reads them.
    path.with_suffix(".json").write_text(json.dumps([dict(poison), stop_at]))
    launch(world_size, "tests.support.poison_worker", path)
    return path.with_suffix(".error").read_text()


def _learn(config: Config, world: World, poison: Mapping[int, float], stop_at: int) -> str:
    with _poisoned(world, poison, Path(config.run.dir) / "STOP", stop_at):
        try:
            training.learn(config, world)
        except ValueError as error:
            return str(error)
    return ""


@contextlib.contextmanager
def _poisoned(
    world: World, poison: Mapping[int, float], stop: Path, stop_at: int
) -> Iterator[None]:
    number = 0
    build_engine, train_step = training.build_engine, steps.train_step

    def build_spoilt(config: Config, stack: torch.nn.Module, world: World) -> object:
        engine = build_engine(config, stack, world)
        dict(stack.named_parameters())[POISONED].register_hook(spoil)
        return engine

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if number in poison and world.rank == world.size - 1:
            gradient = gradient.clone()
            gradient.view(-1)[3] = poison[number]
        return gradient

    def counted_step(config: Config, world: World, engine, global_batch, index: int):
        nonlocal number
        number = index + 1
        if number == stop_at - 1 and world.is_main:
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
    poison, stop_at = json.loads(path.with_suffix(".json").read_text())
    poison = {int(step): value for step, value in poison.items()}
    error = _learn(load(path), world, poison, stop_at)
    if world.is_main:
        path.with_suffix(".error").write_text(error)
    world.close()
