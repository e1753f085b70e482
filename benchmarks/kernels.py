"""What each op takes on this machine, by our implementations and by others'.

    python -m benchmarks.kernels [--op NAME ...] [--out FILE.jsonl] [--device cpu|cuda]

The others are eager PyTorch, torch.compile and what libraries offer. A provider is timed only
where it agrees with the op's definition, outputs and gradients, at the very size timed. Forward and
backward are timed apart, on copies made before the clock starts and with caches flushed; the
ceilings (a copy's bandwidth, a large matrix product) are measured in the same run. Sizes are the
folders' `shapes`, in bf16, on CUDA; on a CPU in fp32 with fewer tokens, and linears a quarter as
wide. FILE gets a JSON line per measurement, and the roofline lies beside it as PNG.

Packs of documents differ from step to step, and some libraries plan anew for each: `first_ms` is
the host's time of a forward and backward at lengths that were not there before. `kernels_ms` is
where the time of one forward and backward of ours goes, copies of arguments included.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

try:
    import triton
except ImportError:  # then its kernels are among what is missing
    triton = None

from mtllm_engine.kernels.contract import Cost, Kernel, map_tensors, named_tensors, shrink

from benchmarks.providers import Arguments, Provider, providers
from mtllm_engine import kernels

ROOT = Path(__file__).resolve().parent.parent
CPU_TOKENS = 256
CPU_EXTRA = {  # the size at which the CPU's loss is to be compared with eager
    "distill_loss": [
        {"width": 4096, "student": (256,) * 32, "teacher": (256,) * 32, "gap": 0, "aligned": False}
    ]
}
LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_S = 5, 50, 5.0  # of a shape's providers
MOST_KERNELS = 24  # of a run
PASSES = ("forward", "backward")
Record = dict[str, Any]


class Clock:
    """Milliseconds of work on a device, by whose and which it is, each time from cold caches."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        size = 2**30 if self.on_gpu else 2**27
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)
        self.marks: dict[tuple[str, str], list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def time(self, whose: str, which: str) -> Iterator[None]:
        self.flushed.zero_()  # this also keeps a GPU busy until the host has launched what follows
        start = self._mark()
        yield
        self.marks.setdefault((whose, which), []).append((start, self._mark()))

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def take(self) -> dict[tuple[str, str], torch.Tensor]:
        """All times since the last call."""
        self.wait()
        marks, self.marks = self.marks, {}
        return {
            key: torch.tensor([self._between(*pair) for pair in pairs])
            for key, pairs in marks.items()
        }

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


class Machine(NamedTuple):
    device: str
    dtype: torch.dtype
    clock: Clock
    bytes_per_s: float
    flops_per_s: float

    def is_memory_bound(self, cost: Cost) -> bool:
        return cost.bytes / self.bytes_per_s > cost.flops / self.flops_per_s

    def least_ms(self, cost: Cost) -> float:
        return 1e3 * max(cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s)


def main() -> None:
    options = parse()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it tells of each start and stop
    machine = measure_ceilings(options.device)
    about = environment(machine)
    ops = kernels.discover()
    chosen = [ops[name] for name in options.op or ops]
    work = [(kernel, shape) for kernel in chosen for shape in shapes(kernel, machine.device)]
    records = []
    with options.out.open("w") if options.out else contextlib.nullcontext() as file:
        for kernel, shape in (bar := tqdm(work, unit="shape", leave=False)):
            bar.set_description(kernel.name)
            for record in measure(kernel, shape, machine):
                records.append(record)
                if file:
                    print(json.dumps(about | record), file=file, flush=True)
    print(table(records, about))
    if options.out:
        draw_roofline(records, machine, about, options.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=list(kernels.discover()), help="default: all")
    parser.add_argument(
        "--out", type=Path, help="for JSON lines; the roofline goes beside it as PNG"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    return parser.parse_args()


def measure_ceilings(device: str) -> Machine:
    """A copy, by bytes read and written, and a product of random matrices."""
    dtype, size = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    clock = Clock(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**29 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    for repeat in range(13):
        for name, work in (("copy", lambda: target.copy_(source)), ("product", lambda: a @ b)):
            with clock.time("timed" if repeat >= 3 else "warm-up", name):
                work()
    times = clock.take()
    copy_s, product_s = (times["timed", name].median().item() / 1e3 for name in ("copy", "product"))
    return Machine(device, dtype, clock, 2 * source.nbytes / copy_s, 2 * size**3 / product_s)


def environment(machine: Machine) -> Record:
    """What every line says about where it comes from."""
    on_gpu = machine.device == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "driver": output_of(*query) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "copy_gbytes_per_s": machine.bytes_per_s / 1e9,
        "product_tflops_per_s": machine.flops_per_s / 1e12,
    }


def output_of(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def shapes(kernel: Kernel, device: str) -> list[dict[str, Any]]:
    if device == "cuda":
        return list(kernel.shapes)
    small = [reduced(shape) for shape in kernel.shapes]
    distinct = [shape for number, shape in enumerate(small) if shape not in small[:number]]
    return distinct + CPU_EXTRA.get(kernel.name, [])


def reduced(shape: dict[str, Any]) -> dict[str, Any]:
    """What a CPU does in a fraction of a second."""
    small = shrink(shape, CPU_TOKENS)
    if "members" in shape or "out_width" in shape:
        small["width"] = shape["width"] // 4
    if "members" in shape:
        small["members"] = tuple(width // 4 for width in shape["members"])
    if "out_width" in shape:
        small["out_width"] = shape["out_width"] // 4
    return small


def measure(kernel: Kernel, shape: dict[str, Any], machine: Machine) -> Iterator[Record]:
    """For each provider a record for each pass, or one that says why there is none."""
    generator = torch.Generator(machine.device).manual_seed(0)
    arguments = kernel.inputs(generator, machine.dtype, **shape)
    costs = dict(zip(PASSES, kernel.cost(machine.dtype, **shape)))
    known, runs = {"op": kernel.name, "shape": shape}, {}
    first_ms = {}
    for provider in providers(kernel, machine.device, machine.dtype):
        try:
            runs[provider.name] = prepare(provider, kernel, arguments, machine.clock)
            if changed := other_lengths(shape):
                generator.manual_seed(0)
                others = kernel.inputs(generator, machine.dtype, **changed)
                first_ms[provider.name] = time_first(provider, others, machine.clock)
        # A missing package, wrong results, no memory: the others shall still be measured
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            yield known | {"provider": provider.name, "status": why}
    started_s = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - started_s > ENOUGH_S:
            break
        for name, run in runs.items():  # in turn, for what else goes on here to slow all alike
            run(name)
    taken = machine.clock.take()
    kernels_ms = {
        name: inside(run, machine.clock)
        for name, run in runs.items()
        if name in kernel.implementations
    }
    for (provider, name), times_ms in taken.items():
        result = {"provider": provider, "status": "ok", "pass": name}
        result |= {"first_ms": first_ms.get(provider), "kernels_ms": kernels_ms.get(provider)}
        yield known | result | figures(times_ms, costs[name], machine)
    torch.compiler.reset()


def prepare(
    provider: Provider, kernel: Kernel, arguments: Arguments, clock: Clock
) -> Callable[[str], None]:
    """Checks a provider and warms it up; returns what times it once.

    Raises:
        ArithmeticError: Its results are not the op's.
    """
    if problems := provider.problems(kernel, arguments):
        raise ArithmeticError("; ".join(problems))
    adapted = provider.adapt(**arguments)
    own = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), adapted)
    function = provider.load()

    def run(name: str) -> None:
        if kernel.name == "attention":  # some are switched on for the whole process: not timed
            function(**map_tensors(torch.Tensor.detach, own))
        time_once(function, own, clock, name)

    for _ in range(5 if clock.on_gpu else 1):
        run("warm-up")
    clock.take()
    return run


def other_lengths(shape: dict[str, Any]) -> dict[str, Any] | None:
    """As many documents, the longest a token shorter; None: of an op that knows no documents."""
    if "lengths" not in shape or max(shape["lengths"]) == 1:
        return None
    longest = max(shape["lengths"])
    return shape | {"lengths": tuple(min(each, longest - 1) for each in shape["lengths"])}


def time_first(provider: Provider, arguments: Arguments, clock: Clock) -> float:
    """Milliseconds of one forward and backward on the host's clock."""
    own = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), arguments)
    run = functools.partial(time_once, provider.load(), provider.adapt(**own), clock, "first")
    clock.wait()
    started_s = time.perf_counter()
    run()
    clock.wait()
    clock.take()
    return 1e3 * (time.perf_counter() - started_s)


def inside(run: Callable[[str], None], clock: Clock) -> dict[str, float]:
    """Milliseconds of a run by kernels (on a CPU: operators), the longest first."""
    kind = ProfilerActivity.CUDA if clock.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        run("profiled")
        clock.wait()
    clock.take()
    key = "self_device_time_total" if clock.on_gpu else "self_cpu_time_total"
    times_ms = {each.key: getattr(each, key) / 1e3 for each in seen.key_averages()}
    longest = sorted(times_ms, key=times_ms.__getitem__, reverse=True)[:MOST_KERNELS]
    return {name: round(times_ms[name], 4) for name in longest if times_ms[name]}


def time_once(function: Callable[..., Any], own: Arguments, clock: Clock, name: str) -> None:
    """A forward and a backward on fresh copies, for some work in place."""
    inputs = map_tensors(lambda x: x.clone() if x.requires_grad else x, own)
    with clock.time(name, "forward"):
        outputs = function(**inputs)
    outputs = [x for x in named_tensors(outputs).values() if x.requires_grad]
    wanted = [x for x in named_tensors(inputs).values() if x.requires_grad]
    upstream = [torch.randn_like(x) for x in outputs]
    with clock.time(name, "backward"):
        torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)


def figures(times_ms: torch.Tensor, cost: Cost, machine: Machine) -> Record:
    median, p20, p80 = (times_ms.quantile(share).item() for share in (0.5, 0.2, 0.8))
    return {
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "repeats": len(times_ms),
        **cost._asdict(),
        "gbytes_per_s": cost.bytes / median / 1e6,
        "tflops_per_s": cost.flops / median / 1e9,
        "bound": "memory" if machine.is_memory_bound(cost) else "compute",
        "of_roofline": machine.least_ms(cost) / median,
    }


def table(records: Sequence[Record], about: Record) -> str:
    """A block per op and shape, a line per provider: forward, then backward."""
    lines = [
        "; ".join(f"{key} {brief(value)}" for key, value in about.items() if value is not None)
    ]
    blocks: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        block = blocks.setdefault(title(record), {})
        block.setdefault(record["provider"], []).append(record)
    head = f"{'ms (p20-p80)':26} {'rate':15} {'roof':>4} {'eager':>8}"
    for name, block in blocks.items():
        lines += ["", name, f"  {'':24}{head}  {head}"]
        eager_ms = {record.get("pass"): record.get("median_ms") for record in block["eager"]}
        for provider, passes in block.items():
            cells = (cell(record, eager_ms.get(record.get("pass"))) for record in passes)
            lines.append(f"  {provider:24}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def title(record: Record) -> str:
    return f"{record['op']}: " + ", ".join(
        f"{key} {brief(value)}" for key, value in record["shape"].items()
    )


def brief(value: Any) -> str:
    """Equal lengths as `32 x 512`, mixed ones by number and median."""
    if isinstance(value, tuple) and len(value) > 4:
        is_equal = len(set(value)) == 1
        return f"{len(value)} x {value[0] if is_equal else f'~{statistics.median(value):.0f}'}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(record: Record, eager_ms: float | None) -> str:
    """Milliseconds, rate in the unit of what bounds the op, of the roof, speed over eager's."""
    if record["status"] != "ok":
        return record["status"]
    rate, unit = record["gbytes_per_s"], "GB/s"
    if record["bound"] == "compute":
        rate, unit = record["tflops_per_s"], "TFLOP/s"
    spread = f"({record['p20_ms']:.4g}-{record['p80_ms']:.4g})"
    faster = f"{eager_ms / record['median_ms']:.2f} x" if eager_ms else ""
    times = f"{record['median_ms']:8.4g} {spread:17}"
    return f"{times} {rate:7.4g} {unit:7} {record['of_roofline']:4.0%} {faster:>8}  "


def draw_roofline(records: Sequence[Record], machine: Machine, about: Record, file: Path) -> None:
    """Colours are ops, marks are providers; full is forward, hollow is backward."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    measured = [record for record in records if record["status"] == "ok"]
    ops, names = (
        list(dict.fromkeys(record[key] for record in measured)) for key in ("op", "provider")
    )
    colours = dict(zip(ops, colormaps["tab10"].colors))
    marks = dict(zip(names, itertools.cycle("osD^vP*X<>hp")))
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="FLOP per byte that the op must move")
    axes.set(yscale="log", ylabel="TFLOP/s")
    for record in measured:
        point = record["flops"] / record["bytes"], record["tflops_per_s"]
        fill = "full" if record["pass"] == "forward" else "none"
        style = {"color": colours[record["op"]], "fillstyle": fill, "alpha": 0.8}
        axes.plot(*point, marks[record["provider"]], **style)
    draw_ceilings(axes, machine)
    handles = [axes.plot([], [], "s", color=colours[op], label=op)[0] for op in ops]
    handles += [axes.plot([], [], marks[name], color="grey", label=name)[0] for name in names]
    handles += [axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: backward")[0]]
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axes.legend(handles=handles, **beside, frameon=False, fontsize="small")
    about = f"{about['device']}, {about['dtype']}, torch {about['torch']}, commit {about['commit']}"
    axes.set_title(about, fontsize="medium", loc="left")
    axes.grid(alpha=0.25)
    figure.savefig(file, dpi=130)


def draw_ceilings(axes: Any, machine: Machine) -> None:
    """The copy's bandwidth up to the ridge, from there the product's rate."""
    ridge, peak = machine.flops_per_s / machine.bytes_per_s, machine.flops_per_s / 1e12
    low, high = axes.get_xlim()[0], max(axes.get_xlim()[1], 10 * ridge)
    axes.plot([low, ridge, high], [low * peak / ridge, peak, peak], color="black", linewidth=1)
    copy = f"copy {machine.bytes_per_s / 1e9:.4g} GB/s"
    product = f"product of matrices {peak:.3g} TFLOP/s"
    middle = (low * ridge) ** 0.5
    slope = middle, middle * peak / ridge
    axes.annotate(copy, slope, (8, -8), textcoords="offset points", va="top")
    axes.annotate(product, (high, peak), (-2, 4), textcoords="offset points", ha="right")
    axes.set(xlim=(low, high), ylim=(None, 2.5 * peak))


if __name__ == "__main__":
    main()
