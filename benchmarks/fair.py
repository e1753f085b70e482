"""Each baseline at the setting that is best for it: micro-batches, checkpointing, torch.compile.

What does not fit into memory, or does not compile, is reported as such and cannot be the best.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import measure
from benchmarks.baselines import Baseline
from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.world import World

DOCUMENTS = (8, 16, 32, 64)  # of a padded micro-batch
SHARES = (4, 2, 1)  # of memory.max_tokens, where nothing is padded
STEPS = 2  # timed, after one that is not


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int
    checkpointing: bool = False
    compiled: bool = False


def settings(baseline: Baseline, most_documents: int, max_tokens: int) -> Iterator[Setting]:
    """What may be the best for it; compiling is for GPUs, and pays where nothing is padded."""
    batches = [max_tokens // share for share in SHARES]
    if not baseline.packed:  # what is above the most is the same again
        below = [size for size in DOCUMENTS if size < most_documents]
        batches = [*below, next((s for s in DOCUMENTS if s >= most_documents), DOCUMENTS[-1])]
        batches = list(dict.fromkeys(batches))
    compiles = baseline.packed and baseline.world.device.type == "cuda"
    for compiled, checkpointing, batch in itertools.product(
        (False, True) if compiles else (False,), (False, True), batches
    ):
        yield Setting(batch, checkpointing, compiled)


def sweep(
    baseline: Baseline, global_batches: Sequence[GlobalBatch], max_tokens: int, world: World
) -> list[dict[str, Any]]:
    """A row for each setting; the baseline is left at the best.

    Args:
        global_batches: 1 + STEPS of them.

    Raises:
        ValueError: No setting runs.
    """
    most = max(sum(map(len, each.micro_batches)) for each in global_batches)
    rows, best = [], None
    for setting in settings(baseline, most, max_tokens):
        row = _measured(baseline, setting, global_batches, world)
        rows.append({"variant": baseline.name, **dataclasses.asdict(setting), **row})
        if "step_s" in row and (best is None or row["step_s"] < best[0]):
            best = row["step_s"], setting
    if best is None:
        raise ValueError(f"{baseline.name} runs in no setting: {rows[0]['status']}")
    _apply(baseline, best[1])
    return rows


def _apply(baseline: Baseline, setting: Setting) -> None:
    for name, value in dataclasses.asdict(setting).items():
        setattr(baseline, name, value)


def _measured(
    baseline: Baseline, setting: Setting, global_batches: Sequence[GlobalBatch], world: World
) -> dict[str, Any]:
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
    baseline.module.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return {"status": status}
