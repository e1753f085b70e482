"""How one optimizer step is measured: its time in turns, and apart from that its parts and memory.

A variant is anything with `name`, `parts`, `module` and `run(global_batch)`, which returns its loss
share and gradient norm.
"""

import contextlib
import functools
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.world import World

# Dense bf16, as the vendor gives it.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989}
Part = tuple[Any, str, str | Callable[..., str]]
"""Object, method, name of the part (or what names a call)."""


class Variant(Protocol):
    name: str
    module: nn.Module
    parts: list[Part]

    def run(self, global_batch: GlobalBatch) -> tuple[torch.Tensor, torch.Tensor]: ...


@contextlib.contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets (object, attribute, value) for a while."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def timed(run: Callable[[], Any], world: World) -> tuple[Any, float]:
    """A call's result and wall time in seconds on this rank, all ranks starting together."""
    world.gather_ints([0])
    synchronize(world)
    started_s = time.perf_counter()
    result = run()
    synchronize(world)
    return result, time.perf_counter() - started_s


def rounds(
    variants: Sequence[Variant],
    global_batches: Sequence[GlobalBatch],
    world: World,
    check: Callable[[str, int, Any], None],
) -> dict[str, list[list[float]]]:
    """Seconds by variant, step and rank.

    Every variant runs each step before any runs the next, in turning order.
    """
    seconds: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    options = {"unit": "step", "disable": not world.is_main, "leave": False}
    with tqdm(total=len(global_batches) * len(variants), **options) as bar:
        for number, global_batch in enumerate(global_batches):
            turn = number % len(variants)
            for variant in [*variants[turn:], *variants[:turn]]:
                bar.set_description(variant.name)
                result, taken_s = timed(functools.partial(variant.run, global_batch), world)
                check(variant.name, number, result)
                seconds[variant.name].append(world.gather(taken_s))
                bar.update()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {
        name: tensor.quantile(share).item()
        for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))
    }


def extremes(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def split(variant: Variant, global_batch: GlobalBatch, world: World) -> dict[str, float]:
    """Seconds of each part of a step on this rank, on the device's clock; `rest` is in no part."""
    spans: list[tuple[str, Any, Any]] = []
    mark = _mark_cuda if world.device.type == "cuda" else time.perf_counter

    def watched(method: Callable, name: str | Callable[..., str]) -> Callable:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = mark()
            result = method(*args, **kwargs)
            part = name if isinstance(name, str) else name(*args, **kwargs)
            spans.append((part, start, mark()))
            return result

        return run

    patches = [
        (item, method, watched(getattr(item, method), name)) for item, method, name in variant.parts
    ]
    with patched(*patches):
        _, total_s = timed(functools.partial(variant.run, global_batch), world)
    seconds: Counter[str] = Counter()
    on_gpu = world.device.type == "cuda"
    for name, start, end in spans:
        seconds[name] += start.elapsed_time(end) / 1000 if on_gpu else end - start
    return dict(seconds) | {"rest": max(0.0, total_s - sum(seconds.values()))}


def trace(
    variant: Variant, global_batch: GlobalBatch, world: World, file: Path | None = None
) -> tuple[dict[str, float], Sequence[Any]]:
    """What PyTorch's profiler sees of a step: kernels, seconds in collectives, bytes above before;
    and all its events, with the shapes of what they read.

    On a CPU, "kernels" are calls of ATen operators, by others too, and the bytes are PyTorch's
    allocator's, from its record of every call: what the process holds beside them (fragments,
    scratch of libraries) is not in it. Collectives overlap the parts of `split`.
    """
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
    watched = {"activities": activities, "profile_memory": not on_gpu, "record_shapes": True}
    with profile(**watched) as profiler:
        variant.run(global_batch)
        synchronize(world)
    if file is not None:
        profiler.export_chrome_trace(str(file))
    events = profiler.profiler.kineto_results.events()
    if on_gpu:
        launched = [event for event in events if _is_kernel(event)]
        kernels = len(launched)
        collectives = [event for event in launched if event.name().startswith("nccl")]
        step_bytes = torch.cuda.max_memory_allocated() - before_bytes
    else:
        kernels = sum(event.name().startswith("aten::") for event in events)
        collectives = [event for event in events if event.name().startswith("gloo:")]
        step_bytes = _peak_bytes(events)
    collectives_s = sum(event.duration_ns() for event in collectives) / 1e9
    seen = {"kernels": kernels, "collectives_s": collectives_s, "step_bytes": step_bytes}
    return seen, profiler.events()


def kept_bytes(variant: Variant) -> int:
    """What lives between steps on this rank: weights, of the trained AdamW's two moments too, and
    gradients where they stay allocated."""
    total = sum(weight.other_bytes for weight in quantised_weights(variant.module))
    for parameter in variant.module.parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        total += held.numel() * (held.element_size() + 8 * parameter.requires_grad)
        total += 0 if parameter.grad is None else parameter.grad.nbytes
    return total


def held_bytes(run: Callable[[], Any], world: World) -> int:
    """What a forward leaves behind for its backward: bytes held more after it, its result too."""
    run()  # what is allocated once is not counted
    alive: list[Any] = []  # until the count is taken
    if world.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        alive.append(run())
        return torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        alive.append(run())
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large product of random matrices reaches on this device, now."""
    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 6)
    pairs = [
        [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(3)
    ]
    alone = World(rank=0, size=1, local_rank=0, device=device)
    multiply = [functools.partial(torch.mm, *pairs[number % 3]) for number in range(repeats + 2)]
    seconds = [timed(run, alone)[1] for run in multiply][2:]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def copy_gbytes_per_s(device: torch.device) -> float:
    """Bytes that a large copy reads and writes on this device, now."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    alone = World(rank=0, size=1, local_rank=0, device=device)
    seconds = [timed(lambda: target.copy_(source), alone)[1] for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def driver(device: torch.device) -> str | None:
    """The NVIDIA driver's version."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def nominal_tflops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def gathered_bytes(variant: Variant, global_batch: GlobalBatch) -> int:
    """Bytes of weights that ZeRO-3 brings to this rank in a step, counted at each gather."""
    total = 0

    def counting(gather: Callable) -> Callable:
        def run(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal total
            parameters = list(parameters)
            total += sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
            return gather(parameters, *args, **kwargs)

        return run

    name = "all_gather_coalesced"
    sharded = [item for item in variant.module.parameters() if hasattr(item, "ds_tensor")]
    with patched(*((item, name, counting(getattr(item, name))) for item in sharded)):
        variant.run(global_batch)
    return total


def all_gather_gbytes_per_s(num_bytes: int, world: World) -> float:
    """Of a plain all-gather of `num_bytes` in all: the bytes that each rank receives, by time."""
    part = torch.ones(max(1, num_bytes // world.size), dtype=torch.uint8, device=world.device)
    whole = torch.empty(len(part) * world.size, dtype=torch.uint8, device=world.device)
    gather = functools.partial(dist.all_gather_into_tensor, whole, part)
    seconds = [timed(gather, world)[1] for _ in range(7)]
    return len(part) * (world.size - 1) / statistics.median(seconds[2:]) / 1e9


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _mark_cuda() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_kernel(event: Any) -> bool:
    """Runs on the GPU, and is no copy and no region that the host has named there."""
    on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
    is_copy = event.name().startswith(("Memcpy", "Memset"))
    return on_gpu and not event.is_user_annotation() and not is_copy


def _peak_bytes(events: Sequence[Any]) -> int:
    """The most that PyTorch's CPU allocator held above the start."""
    held = peak = 0
    records = [event for event in events if event.name() == "[memory]"]
    for event in sorted(records, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
