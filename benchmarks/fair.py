"""Each baseline at the setting that is best for it: micro-batches, checkpointing, torch.compile.

What does not fit into memory, or does not compile, is reported as such and cannot be the best.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import measure
from benchmarks.baselines import Baseline
from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.world import World

SHARES = (8, 4, 2, 1)  # of a step's documents, or of memory.max_tokens where nothing is padded
STEPS = 2  # timed, after one that is not
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int
    checkpointing: bool = False
    compiled: bool = False


def sweep(
    baseline: Baseline, global_batches: Sequence[GlobalBatch], max_tokens: int, world: World
) -> Iterator[Row]:
    """A row for each setting; in the end the baseline is left at the best.

    Args:
        global_batches: 1 + STEPS of them.

    Raises:
        ValueError: No setting runs.
    """
    most = max(sum(map(len, each.micro_batches)) for each in global_batches)
    sizes = _sizes(baseline, most, max_tokens)
    compiles = baseline.packed and world.device.type == "cuda"  # padded lengths are ever new ones
    best: dict[Setting, float] = {}
    status = ""
    for compiled in (False, True) if compiles else (False,):
        for checkpointing in (False, True):
            for setting in (Setting(size, checkpointing, compiled) for size in sizes):
                if checkpointing and setting.batch < _largest_paying(best, compiled):
                    continue
                row = _measured(baseline, setting, global_batches, world)
                status = row["status"]
                if "step_s" in row:
                    best[setting] = row["step_s"]
                yield {"variant": baseline.name, **dataclasses.asdict(setting), **row}
    if not best:
        raise ValueError(f"{baseline.name} runs in no setting: {status}")
    _apply(baseline, min(best, key=best.__getitem__))


def _sizes(baseline: Baseline, most_documents: int, max_tokens: int) -> list[int]:
    """Micro-batches, of which the largest holds all of a step."""
    whole = max_tokens if baseline.packed else 1 << (most_documents - 1).bit_length()
    return sorted({max(1, whole // share) for share in SHARES})


def _largest_paying(taken_s: dict[Setting, float], compiled: bool) -> int:
    """Below the best micro-batch without it checkpointing only adds work."""
    plain = [each for each in taken_s if each.compiled == compiled and not each.checkpointing]
    return min(plain, key=taken_s.__getitem__).batch if plain else 0


def _apply(baseline: Baseline, setting: Setting) -> None:
    for name, value in dataclasses.asdict(setting).items():
        setattr(baseline, name, value)


def _measured(
    baseline: Baseline, setting: Setting, global_batches: Sequence[GlobalBatch], world: World
) -> Row:
    _apply(baseline, setting)
    try:
        seconds = []
        for global_batch in global_batches[: 1 + STEPS]:
            run = functools.partial(baseline.run, global_batch)
            seconds.append(max(world.gather(measure.timed(run, world)[1])))
        return {"status": "ok", "step_s": statistics.mean(seconds[1:])}
    except torch.OutOfMemoryError:
        if world.size > 1:  # the others would wait for this rank
            raise
        status = "out of memory"
    except Exception as error:
        if not setting.compiled:
            raise
        status = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    baseline.module.zero_grad(set_to_none=False)  # which ranks sum where they lie
    torch.cuda.empty_cache()
    return {"status": status}
