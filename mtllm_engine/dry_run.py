"""`mtllm train --dry-run`: all that a run does up to its first step, and that step; then what it
took, beside the estimate.

    deepspeed --num_gpus N --module mtllm_engine.dry_run CONFIG [section.key=value ...]

Nothing is left behind: what a run writes before its first step goes to a folder beside run.dir that
is removed.
"""

import math
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from mtllm_engine.config import Config
from mtllm_engine.data.stream import GlobalBatch, agree
from mtllm_engine.model.build import read_models
from mtllm_engine.train import assemble, prepare
from mtllm_engine.training import memory
from mtllm_engine.training.cost import predict, work_of_batch
from mtllm_engine.training.engine import keeps_on_node
from mtllm_engine.training.gpus import GPUS, Cluster, gpu_of
from mtllm_engine.training.launch import run_command
from mtllm_engine.training.layout import settle
from mtllm_engine.training.log import environment, header, pair_tokens, print_table
from mtllm_engine.training.step import train_step
from mtllm_engine.world import World


def dry_run(config: Config, world: World) -> None:
    """Makes one step of a new run and prints what it took.

    Raises:
        ValueError: Something the user can mend; the message names it and the fix.
    """
    folder = world.on_main(lambda: _folder_beside(Path(config.run.dir)))
    try:
        if config.data.teacher_states:
            world.on_main(lambda: _link_corpora(Path(config.run.dir), Path(folder)))
        _step(config, replace(config, run=replace(config.run, dir=folder)), world)
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _folder_beside(run: Path) -> str:
    """On the run's own disk, which all ranks see."""
    run = run.absolute()
    place = next(each for each in run.parents if each.is_dir())
    return tempfile.mkdtemp(prefix=f".{run.name}.dry-", dir=place)


def _link_corpora(run: Path, folder: Path) -> None:
    """Stored states lie beside the corpora that a task's files were packed into: these are used as
    they are."""
    if (run / "corpus").is_dir():
        shutil.copytree(run / "corpus", folder / "corpus", copy_function=os.link)


def _step(asked: Config, config: Config, world: World) -> None:
    """Args: asked: The configuration with its own run.dir."""
    start_s, libraries = time.perf_counter(), _peak_bytes(world)
    config, layout = settle(world.on_main(lambda: prepare(config)), world)
    assembled = assemble(config, world)
    if world.is_main:
        about = (config, world, assembled.stack, assembled.tokenizer)
        rows = header(*about, 0, assembled.fit, layout, device=environment(world)["device"])
        print_table({key: row.replace(config.run.dir, asked.run.dir) for key, row in rows.items()})
    batch = agree(assembled.stream, world, config.memory.max_tokens)
    assembled.stream.close()
    _wait(world)
    ready_s = time.perf_counter()
    result = train_step(config, world, assembled.engine, batch, 0)
    losses = world.sum(result.loss.double().clone())
    _wait(world)
    step_s = time.perf_counter() - ready_s
    peaks = world.gather(_peak_bytes(world))
    if world.is_main:
        values = {"loss": losses.item(), "gradient": result.grad_norm.item()}
        times_s = (ready_s - start_s, step_s)
        rows = _rows(config, world, batch, values, times_s, (libraries, max(peaks)))
        print()
        print_table(rows)


def _rows(
    config: Config,
    world: World,
    batch: GlobalBatch,
    values: dict[str, float],
    times_s: tuple[float, float],
    held: tuple[int, int],
) -> dict[str, str]:
    """What the step took, by name.

    Args:
        times_s: Until the step, and its own.
        held: Bytes, before anything was read and at most.
    """
    before_s, step_s = times_s
    tokens, steps = (batch.student_tokens, batch.teacher_tokens), config.optim.steps
    speed = pair_tokens(*tokens) / step_s
    rows = {"dry run": f"one step of {steps}, on {world.size} x {world.device.type}"}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    finite = all(map(math.isfinite, values.values()))
    rows["result"] = shown + ("" if finite else "; a run would make no update of it")
    rows["tokens"] = f"{tokens[0]:,} of the student, {tokens[1]:,} of the teacher"
    rows["time"] = f"{before_s:.1f} s until the step, {step_s:.2f} s for it: {speed:,.0f} pairs/s"
    rows["time of a run"] = f"{_duration(step_s * steps)}, if all steps took as long; the first is "
    rows["time of a run"] += "slower than those after it, as kernels are compiled in it"
    models = memory.unfilled(config, *read_models(config.model))
    if world.device.type == "cuda" and (predicted := _predicted(config, models, world, batch)):
        rows["predicted"] = predicted
    node = world.local_size * keeps_on_node(config, world)
    lines = memory.rows(config, models, world.size, node_size=node)
    on_gpu = world.device.type == "cuda"
    estimate = memory.total(lines) - (0 if on_gpu else memory.ASSUMED)
    before, peak = map(_size, held)
    # A process on the CPU holds its libraries too.
    measured = f"{peak} on each GPU" if on_gpu else f"{peak} of each process, {before} at its start"
    rows["memory"] = f"at most {measured}; estimated {_size(estimate)}:"
    for line in lines if on_gpu else [each for each in lines if each.name != "assumed"]:
        rows[f"  {line.name}"] = f"{_size(line.bytes)}  {line.how}"
    return rows


def _predicted(config: Config, models: memory.Models, world: World, batch: GlobalBatch) -> str:
    """How long the plan says that such a step takes here; "" where it does not know the GPU."""
    device = torch.cuda.get_device_properties(world.device)
    name = gpu_of(device.name, device.total_memory)
    if name is None:
        return ""
    nodes = world.size // world.local_size
    cluster = Cluster(gpu=GPUS[name], gpus=world.local_size, nodes=nodes)
    step = predict(config, models, cluster, work_of_batch(config, batch, world.size))
    return f"{step.seconds:.2f} s for a step by `mtllm plan`: {step.bound}"


def _size(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def _wait(world: World) -> None:
    """Until the device has done all that it was told to."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(world: World) -> int:
    """The most that this rank has held."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_command(dry_run, "dry_run"))
