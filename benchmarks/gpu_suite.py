"""Everything worth doing with a GPU for ten minutes, best first; what is done is kept if the rest is cut off.

    python -m benchmarks.gpu_suite --out DIR          Llama-3-8B and NLLB-600M shapes, random weights
    python -m benchmarks.gpu_suite --out DIR --tiny   the same stages in small, on any machine

Needs a checkout and its dependencies (pytest and hypothesis too), no installed project, no network and no weights. DIR
gets a log and the JSON lines of each stage, and summary.json after every one.
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

from mtllm_engine.metrics import environment, print_table
from mtllm_engine.world import World, device_type

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 570  # of all stages: a machine lent for ten minutes needs some to start and to send results back


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, and how long it may take however much time is left."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def stages(out: Path, *, tiny: bool, fp8: bool) -> list[Stage]:
    """Correctness first, then the whole step, also on an fp8 base, then each kernel."""
    config, shape = ROOT / "configs" / "nllb600m_llama3_8b.toml", "llama3_8b+nllb600m"
    only, step_options, kernel_options = [], ["--lengths", "350,40"], ["--device", "cuda"]
    if tiny:
        shape, only = "tiny+tiny", ["-k", "swiglu"]
        step_options = ["--lengths", "40", "--steps", "1", "memory.max_tokens=1024", "data.pack_tokens=512"]
        step_options += ["model.dtype=float32"]
        kernel_options = ["--op", "swiglu"]
    files = ("tests/test_kernels.py", "tests/test_quantised.py")
    workers = ("-n", "8") if find_spec("xdist") else ()  # most of the time goes into compiling kernels
    test = ("-m", "pytest", *files, "-q", "--maxfail=20", "-p", "no:cacheprovider", *workers, *only)
    step = ("-m", "benchmarks.step", str(config), "--random-weights", shape, *step_options)
    step_fp8 = (*step, "--baseline", "recipe" if tiny else "stack", "model.base=fp8")
    kernels = ("-m", "benchmarks.kernels", *kernel_options)
    return [
        Stage(name="tests", command=test, limit_s=180),
        Stage(name="step", command=(*step, "--baseline", "all", "--out", str(out / "step.jsonl")), limit_s=300),
        *[Stage(name="step-fp8", command=(*step_fp8, "--out", str(out / "step-fp8.jsonl")), limit_s=150)] * fp8,
        Stage(name="kernels", command=(*kernels, "--out", str(out / "kernels.jsonl")), limit_s=300),
    ]


def run(stage: Stage, out: Path, left_s: float) -> dict[str, object]:
    """One stage, its output in DIR/NAME.log; says how it ended."""
    started_s, limit_s = time.perf_counter(), min(stage.limit_s, left_s)
    log = out / f"{stage.name}.log"
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        try:
            environ = os.environ | {"PYTHONPATH": search}
            command = [sys.executable, *stage.command]
            done = subprocess.run(command, cwd=ROOT, env=environ, stdout=file, stderr=file, timeout=limit_s)
            ended = "done" if done.returncode == 0 else f"failed, status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit_s:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    took_s = time.perf_counter() - started_s
    return {"stage": stage.name, "ended": ended, "took_s": round(took_s, 1), "last_line": lines[-1] if lines else ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages; the exit status is 0 if all of them ended well."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="in small, to see whether it works")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help=f"of all (default: {LIMIT_S})")
    arguments = parser.parse_args(argv)
    if device_type() == "cpu" and not arguments.tiny:
        print("benchmarks.gpu_suite: error: there is no GPU that PyTorch sees; add --tiny to try it without")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends_s = time.perf_counter() + arguments.limit
    world = World(rank=0, size=1, local_rank=0, device=torch.device(device_type()))
    summary = {"environment": environment(world), "stages": []}
    fp8 = device_type() == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    for stage in stages(out, tiny=arguments.tiny, fp8=fp8):
        print(f"{stage.name} ...", flush=True)
        summary["stages"].append(run(stage, out, max(1.0, ends_s - time.perf_counter())))
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
    rows = {row["stage"]: f"{row['ended']}, {row['took_s']} s: {row['last_line'][:100]}" for row in summary["stages"]}
    print_table({"device": summary["environment"]["device"]} | rows)
    return 0 if all(row["ended"] == "done" for row in summary["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
