"""Everything worth doing with a GPU for ten minutes, best first; what is done is kept if the rest
is cut off.

    python -m benchmarks.gpu_suite --out DIR         # Llama-3-8B, NLLB-600M shapes, random weights
    python -m benchmarks.gpu_suite --out DIR --tiny  # the same stages in small, on any machine

Needs a checkout and its dependencies (pytest and hypothesis too), no installed project, no network
and no weights. DIR gets a log and the JSON lines of each stage, and summary.json after every one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from mtllm_engine.training.log import environment, print_table
from mtllm_engine.world import World, device_type

ROOT = Path(__file__).resolve().parent.parent
# Of all stages: a machine lent for ten minutes needs some to start and to send results back.
LIMIT_S = 570.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, and how much of the suite's time it may take, however much is left."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def stages(out: Path, *, tiny: bool, fp8: bool) -> list[Stage]:
    """Correctness first, then the whole step, also on an fp8 base, then each kernel."""
    config, shape = ROOT / "configs" / "nllb600m_llama3_8b.toml", "llama3_8b+nllb600m"
    only, step_options, kernel_options = [], ["--lengths", "350,40"], ["--device", "cuda"]
    if tiny:
        shape, only, kernel_options = "tiny+tiny", ["-k", "swiglu"], ["--op", "swiglu"]
        step_options = ["--lengths", "40", "--steps", "1", "model.dtype=float32"]
        step_options += ["memory.max_tokens=1024", "data.pack_tokens=512"]
    files = ("tests/kernels/test_kernels.py", "tests/kernels/test_quantised.py")
    # Most of the time goes into compiling kernels.
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    test = ("-m", "pytest", *files, "-q", "--maxfail=20", "-p", "no:cacheprovider", *workers, *only)
    step = ("-m", "benchmarks.step", str(config), "--random-weights", shape, *step_options)
    step_fp8 = (*step, "--baseline", "padded" if tiny else "unpadded", "model.quantization=fp8")
    kernels = ("-m", "benchmarks.kernels", *kernel_options)

    def saved(command: tuple[str, ...], name: str) -> tuple[str, ...]:
        return (*command, "--out", str(out / f"{name}.jsonl"))

    suite = [
        Stage(name="tests", command=test, limit_s=180),
        Stage(name="step", command=saved((*step, "--baseline", "all"), "step"), limit_s=300),
        Stage(name="step-fp8", command=saved(step_fp8, "step-fp8"), limit_s=150),
        Stage(name="kernels", command=saved(kernels, "kernels"), limit_s=300),
    ]
    return [stage for stage in suite if fp8 or stage.name != "step-fp8"]


def run(stage: Stage, out: Path, limit_s: float | None) -> dict[str, object]:
    """One stage, its output in DIR/NAME.log; says how it ended. Args: limit_s: None: no limit."""
    started_s = time.perf_counter()
    log = out / f"{stage.name}.log"
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        try:
            environ = os.environ | {"PYTHONPATH": search}
            command = [sys.executable, *stage.command]
            options = {"cwd": ROOT, "env": environ, "stdout": file, "stderr": file}
            done = subprocess.run(command, **options, timeout=limit_s)
            ended = "done" if done.returncode == 0 else f"failed, status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit_s:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    took_s = round(time.perf_counter() - started_s, 1)
    last = lines[-1] if lines else ""
    return {"stage": stage.name, "ended": ended, "took_s": took_s, "last_line": last}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages; the exit status is 0 if all of them ended well."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="in small, to see whether it works")
    limit = f"of all (default: {LIMIT_S:.0f}; none with --tiny, which is for any machine)"
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    arguments = parser.parse_args(argv)
    if device_type() == "cpu" and not arguments.tiny:
        fix = "add --tiny to try it without"
        print(f"benchmarks.gpu_suite: error: there is no GPU that PyTorch sees; {fix}")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    limit_s = arguments.limit or (None if arguments.tiny else LIMIT_S)
    started_s = time.perf_counter()
    world = World(rank=0, size=1, local_rank=0, device=torch.device(device_type()))
    summary = {"environment": environment(world), "stages": []}
    fp8 = device_type() == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    for stage in stages(out, tiny=arguments.tiny, fp8=fp8):
        print(f"{stage.name} ...", flush=True)
        left_s = limit_s and max(1.0, started_s + limit_s - time.perf_counter())
        row = run(stage, out, left_s and min(stage.limit_s, left_s))
        summary["stages"].append(row)
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
    rows = {
        row["stage"]: f"{row['ended']}, {row['took_s']} s: {row['last_line'][:100]}"
        for row in summary["stages"]
    }
    print_table({"device": summary["environment"]["device"]} | rows)
    return 0 if all(row["ended"] == "done" for row in summary["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
