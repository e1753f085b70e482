"""How weights lie on the ranks: whole on each where they fit, sharded where they do not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from mtllm_engine.config import Config
from mtllm_engine.model.build import read_models
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.training import memory
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
    layout = world.on_main(lambda: choose(config, *read_models(config.model), world.size, sizes))
    return settled(config, layout.stage), layout.words


def settled(config: Config, stage: int) -> Config:
    """The configuration with its layout decided: one that can be read again from a run's folder."""
    secondary = config.zero.secondary if stage == SHARDED else "none"
    return replace(config, zero=replace(config.zero, stage=stage, secondary=secondary))


def choose(
    config: Config,
    encoder: PreTrainedConfig,
    decoder: DecoderSpec,
    world_size: int,
    sizes: Sequence[int],
) -> Layout:
    """The layout that the configuration asks for, or with "auto" the fastest that fits.

    Where weights are whole nothing is gathered, so that is the faster one.

    Args:
        sizes: Bytes of the ranks' GPUs, of which the smallest counts; empty: they run on CPUs.
    """
    stage, reason = _decide(config, encoder, decoder, world_size, sizes)
    ranks = f"{world_size} {'GPU' if sizes else 'CPU rank'}{'s' if world_size > 1 else ''}"
    each = "each of " if world_size > 1 else ""
    where = f"sharded over {ranks}" if stage == SHARDED else f"whole on {each}{ranks}"
    idle = ["[deepspeed]"] * bool(config.deepspeed)
    idle += ["zero.secondary"] * (config.zero.secondary != "none")
    unused = "".join(f"; {each} has no effect" for each in idle) if stage == WHOLE else ""
    return Layout(stage, f"{where} ({reason}){unused}")


def _decide(
    config: Config,
    encoder: PreTrainedConfig,
    decoder: DecoderSpec,
    world_size: int,
    sizes: Sequence[int],
) -> tuple[int, str]:
    """The value of `zero.stage`, and why. Args: as `choose`."""
    asked = config.zero.stage
    if asked != "auto":
        return asked, f"zero.stage={asked}"
    if not sizes:
        return SHARDED, "zero.stage=auto on CPUs"
    there, needed = min(sizes), {}
    for stage in (WHOLE, SHARDED):
        each = replace(config, zero=replace(config.zero, stage=stage))
        needed[stage] = memory.total(memory.estimate(each, encoder, decoder, world_size))
    # One GPU has nobody to share weights with.
    stage = SHARDED if needed[WHOLE] > there and world_size > 1 else WHOLE
    whole, sharded = (f"{needed[each] / 1e9:.1f} GB" for each in (WHOLE, SHARDED))
    reason = f"whole takes an estimated {whole} of {there / 1e9:.1f}"
    reason += f", sharded {sharded}" if stage == SHARDED else ""
    if max(sizes) > there:
        reason += f", the least of these GPUs, which have up to {max(sizes) / 1e9:.1f}"
    reason += "; it may not fit" if needed[stage] > there else ""
    return stage, f"zero.stage=auto: {reason}"
