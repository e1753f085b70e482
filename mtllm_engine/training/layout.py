"""How weights lie on the ranks: whole on each where they fit, sharded where they do not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedConfig

from mtllm_engine.config import Config
from mtllm_engine.model.build import read_models
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.training import memory
from mtllm_engine.training.engine import keeps_on_node
from mtllm_engine.world import World

WHOLE, SHARDED = 0, 3
"""Values of `zero.stage`."""


class Layout(NamedTuple):
    """What `zero.stage` comes to on the ranks that there are."""

    stage: int
    words: str
    """What it is, and why."""


def settle(config: Config, world: World) -> tuple[Config, str]:
    """The configuration with its layout decided, and in words; every rank calls it.

    Raises:
        ValueError: A model's configuration cannot be read.
    """
    sizes: list[int] = []
    if world.device.type == "cuda":
        sizes = world.gather(torch.cuda.get_device_properties(world.device).total_memory)
    node = world.local_size * keeps_on_node(config, world)

    def needed(stage: int) -> int:
        return needed_bytes(config, stage, *read_models(config.model), world.size, node_size=node)

    layout = world.on_main(lambda: choose(config, world.size, sizes, needed))
    return settled(config, layout.stage), layout.words


def settled(config: Config, stage: int) -> Config:
    """The configuration with its layout decided: one that can be read again from a run's folder."""
    secondary = config.zero.secondary if stage == SHARDED else "none"
    return replace(config, zero=replace(config.zero, stage=stage, secondary=secondary))


def needed_bytes(
    config: Config,
    stage: int,
    encoder: PreTrainedConfig,
    decoder: DecoderSpec,
    world_size: int,
    *,
    node_size: int = 0,
) -> int:
    """What a GPU needs in a layout, by the estimate. Args: node_size: As of `memory.rows`."""
    asked = replace(config, zero=replace(config.zero, stage=stage))
    options = {"node_size": node_size if stage == SHARDED else 0}
    return memory.total(memory.estimate(asked, encoder, decoder, world_size, **options))


def choose(
    config: Config, world_size: int, sizes: Sequence[int], needed: Callable[[int], int]
) -> Layout:
    """The layout that the configuration asks for, or with "auto" the fastest that fits.

    Where weights are whole nothing is gathered, so that is the faster one.

    Args:
        sizes: Bytes of the ranks' GPUs, of which the smallest counts; empty: they run on CPUs.
        needed: Bytes of a GPU in a layout; asked where it decides.
    """
    stage, reason = _decide(config.zero.stage, world_size, sizes, needed)
    ranks = f"{world_size} {'GPU' if sizes else 'CPU rank'}{'s' if world_size > 1 else ''}"
    each = "each of " if world_size > 1 else ""
    where = f"sharded over {ranks}" if stage == SHARDED else f"whole on {each}{ranks}"
    idle = ["[deepspeed]"] * bool(config.deepspeed)
    idle += ["zero.secondary"] * (config.zero.secondary != "none")
    unused = "".join(f"; {each} has no effect" for each in idle) if stage == WHOLE else ""
    return Layout(stage, f"{where} ({reason}){unused}")


def _decide(
    asked: Literal["auto", 0, 3],
    world_size: int,
    sizes: Sequence[int],
    needed: Callable[[int], int],
) -> tuple[int, str]:
    """A value of `zero.stage`, and why."""
    if asked != "auto":
        return asked, f"zero.stage={asked}"
    if not sizes:
        return SHARDED, "zero.stage=auto on CPUs"
    there, whole, stage = min(sizes), needed(WHOLE), WHOLE
    least, reason = whole, f"whole takes an estimated {whole / 1e9:.1f} GB of {there / 1e9:.1f}"
    if whole > there and world_size > 1:  # one GPU has nobody to share weights with
        least, stage = needed(SHARDED), SHARDED
        reason += f", sharded {least / 1e9:.1f} GB"
    if max(sizes) > there:
        reason += f", the least of these GPUs, which have up to {max(sizes) / 1e9:.1f}"
    reason += "; it may not fit" if least > there else ""
    return stage, f"zero.stage=auto: {reason}"
