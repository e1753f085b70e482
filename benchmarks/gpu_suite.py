"""Everything worth doing with a GPU, in slices of at most nine minutes; what is done is kept if the
rest is cut off.

    python -m benchmarks.gpu_suite --out DIR --slice attention   # or loss, step, short, use; or all
    python -m benchmarks.gpu_suite --out DIR --slice step --tiny # in small, on any machine

| slice | what it does |
|---|---|
| attention | tests attention's implementations, then measures all of them |
| loss | tests all other ops, then measures them: the adapted linears and the loss first |
| step | ours in several ways, and beside the others, by kinds of kernels; the fastest at its best |
| short | the same at a median of 40 tokens and at equal lengths: launches, and gaps between them |
| use | evaluating, translate-test, vectors, and steps with the data's own cost |

What counts most comes first. The search for a setting at which the fastest baseline is at its best
compiles, and the padded ones launch a hundred thousand kernels in a step of short texts: these may
be cut off.

Needs a checkout and its dependencies (pytest and hypothesis too), no installed project, no network
and no weights: models have random ones. `use` makes a small land with sentencepiece, or takes one
that lies in DIR/land already; NF4 needs bitsandbytes, and FlashAttention 4 its package. DIR gets a
log and the JSON lines of each stage, row by row, and summary.json after every stage.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from mtllm_engine.training.log import environment, print_table
from mtllm_engine.world import World, device_type

ROOT = Path(__file__).resolve().parent.parent
# Of a slice: a machine lent for ten minutes needs some to start and to send results back.
LIMIT_S = 540.0
SHAPE = "llama3_8b+nllb600m"
TESTS = "tests/kernels/"
FIRST_OPS = ("lora_linear", "distill_loss")
OTHER_OPS = ("swiglu", "rms_norm", "rope", "projection")
SMALL_STEP = ("--steps", "1", "model.dtype=float32")
SMALL_STEP += ("memory.max_tokens=1024", "data.pack_tokens=512")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, and how much of the slice's time it may take, however much is left."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The stages' commands, for a GPU or in small."""

    out: Path
    tiny: bool
    fp8: bool
    """The GPU multiplies it."""
    flash4: bool
    """flash-attn-4 is there, and the GPU one of its."""

    @property
    def fastest(self) -> str:
        """Of the baselines; it runs on a GPU alone."""
        return "padded" if self.tiny else "unpadded"

    @property
    def dtype(self) -> str:
        """A GPU's attention is in half precision alone."""
        return "float32" if self.tiny else "bfloat16"

    def attention(self) -> Iterator[Stage]:
        files = ("test_attention.py", "test_kernels.py")
        yield self._tests("attention-tests", files, only="attention", limit_s=140)
        yield self._kernels("attention", ("attention",), limit_s=390)

    def loss(self) -> Iterator[Stage]:
        files = ("test_kernels.py", "test_update.py", "test_quantised.py")
        yield self._tests("loss-tests", files, only="not attention", limit_s=150)
        yield self._kernels("loss", FIRST_OPS, limit_s=210)
        yield self._kernels("other-ops", OTHER_OPS, limit_s=180)

    def step(self) -> Iterator[Stage]:
        lengths = ("--lengths", "350")
        others = ["model.lora_update=swiglu"]
        others += ["model.quantization=fp8"] if self.fp8 else []
        others += ["model.attention=flash_attn_4"] if self.flash4 else []
        ways = (word for other in others for word in ("--beside", other))
        yield self._step("step-ours", *lengths, *ways, limit_s=120)
        yield self._step("step", *lengths, "--baseline", "all", limit_s=165)
        best = ("--baseline", self.fastest, "--sweep")
        yield self._step("step-best", *lengths, *best, limit_s=185)
        yield self._step("step-nf4", *lengths, "--beside", "model.quantization=nf4", limit_s=70)

    def short(self) -> Iterator[Stage]:
        both = ("--lengths", "40,equal", "--baseline")
        yield self._step("short", *both, self.fastest, limit_s=110)
        best = ("--lengths", "40", "--baseline", self.fastest, "--sweep")
        yield self._step("short-best", *best, limit_s=210)
        yield self._step("short-padded", *both, "padded", limit_s=220)

    def use(self) -> Iterator[Stage]:
        """What a small land's recipe leaves, trained for a few steps."""
        land, run = self.out / "land", self.out / "run"
        command = ("-m", "benchmarks.land", str(land))
        yield Stage(name="use-land", command=command, limit_s=80)
        recipe = (str(ROOT / "configs" / "quickstart.toml"), *_in(land, run, self.dtype))
        yield Stage(name="use-recipe", command=(*CLI, "run", *recipe), limit_s=140)
        command = ("-m", "benchmarks.evaluation", str(run / "evaluate-0.toml"))
        yield Stage(name="use-evaluation", command=self._saved(command, "evaluation"), limit_s=80)
        exported = str(self.out / "exported")
        yield Stage(
            name="use-export", command=(*CLI, "export", str(run), "--out", exported), limit_s=30
        )
        few = ("--texts", "16", "--repeats", "1") if self.tiny else ("--texts", "1024")
        command = ("-m", "benchmarks.encode", exported, "--dtype", self.dtype, *few)
        yield Stage(name="use-encode", command=self._saved(command, "encode"), limit_s=120)
        data = (f"model.encoder={land / 'mt'}", f"model.decoder={land / 'llm'}")
        data += (f'data.train=["{land / "shards" / "train"}"]',)
        data += (f"data.lanes={2 if self.tiny else 16}",)
        # The tiny shapes have too few embeddings for these tokenizers: the land's own models then
        own = ("--random-weights", "", "model.adapters=[]") if self.tiny else ()
        yield self._step("use-data", "--lengths", "40", *own, *data, limit_s=90)

    def _tests(self, name: str, files: Sequence[str], *, only: str, limit_s: float) -> Stage:
        if self.tiny:
            files, only = ("test_kernels.py",), "bad_spans"
        # Most of the time goes into compiling kernels.
        workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
        options = ("-q", "--maxfail=20", "-p", "no:cacheprovider", *workers, "-k", only)
        paths = (f"{TESTS}{file}" for file in files)
        return Stage(name=name, command=("-m", "pytest", *paths, *options), limit_s=limit_s)

    def _kernels(self, name: str, ops: Sequence[str], *, limit_s: float) -> Stage:
        device = "cpu" if self.tiny else "cuda"
        ops = ops[-1:] if self.tiny else ops
        command = ("-m", "benchmarks.kernels", "--device", device, "--op", *ops)
        return Stage(name=name, command=self._saved(command, name), limit_s=limit_s)

    def _step(self, name: str, *options: str, limit_s: float) -> Stage:
        config, shape = ROOT / "configs" / "nllb600m_llama3_8b.toml", SHAPE
        small: tuple[str, ...] = ("--steps", "3")
        if self.tiny:
            shape, small = "tiny+tiny", SMALL_STEP
            options = tuple("40" if word == "350" else word for word in options)
        command = ("-m", "benchmarks.step", str(config), "--random-weights", shape)
        command = self._saved((*command, *small, *options), name)
        return Stage(name=name, command=command, limit_s=limit_s)

    def _saved(self, command: tuple[str, ...], name: str) -> tuple[str, ...]:
        return (*command, "--out", str(self.out / f"{name}.jsonl"))


CLI = ("-m", "mtllm_engine.cli")
SLICES: dict[str, Callable[[Suite], Iterator[Stage]]] = {
    name: getattr(Suite, name) for name in ("attention", "loss", "step", "short", "use")
}


def _has_flash4() -> bool:
    return bool(find_spec("flash_attn") and find_spec("flash_attn.cute"))


def _in(land: Path, run: Path, dtype: str) -> list[str]:
    """The quickstart's recipe in another folder, with steps that are enough for every file."""
    task = f"sib200:{land / 'sib200'}"
    return [
        f"model.encoder={land / 'mt'}",
        f"model.decoder={land / 'llm'}",
        f"task.train={task}",
        f"task.validation={task}",
        f'task.test=["{task}"]',
        f'stage1.data.train=["{land / "shards" / "train"}"]',
        f'stage2.data.train=["{land / "shards" / "train"}"]',
        f"stage1.validation.corpus={land / 'shards' / 'validation'}",
        "stage1.probe.folder=",
        f"recipe.dir={run}",
        "recipe.gpus=1",
        "zero.stage=0",
        f"model.dtype={dtype}",
        "stage1.optim.steps=4",
        "finetune.optim.epochs=1.0",
        "stage2.optim.steps=4",
    ]


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
    """Runs a slice's stages, or all slices'; the exit status is 0 if all of them ended well."""
    arguments = _parser().parse_args(argv)
    if device_type() == "cpu" and not arguments.tiny:
        fix = "add --tiny to try it without"
        print(f"benchmarks.gpu_suite: error: there is no GPU that PyTorch sees; {fix}")
        return 1
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    limit_s = arguments.limit or (None if arguments.tiny else LIMIT_S)
    world = World(rank=0, size=1, local_rank=0, device=torch.device(device_type()))
    fp8 = device_type() == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    suite = Suite(out=out, tiny=arguments.tiny, fp8=fp8, flash4=fp8 and _has_flash4())
    summary = {"environment": environment(world), "stages": []}
    for name in SLICES if arguments.slice == "all" else [arguments.slice]:
        started_s = time.perf_counter()
        for stage in SLICES[name](suite):
            print(f"{stage.name} ...", flush=True)
            left_s = limit_s and max(1.0, started_s + limit_s - time.perf_counter())
            row = run(stage, out, left_s and min(stage.limit_s, left_s))
            summary["stages"].append({"slice": name, **row})
            (out / "summary.json").write_text(json.dumps(summary, indent=1))
    rows = {
        row["stage"]: f"{row['ended']}, {row['took_s']} s: {row['last_line'][:100]}"
        for row in summary["stages"]
    }
    print_table({"device": summary["environment"]["device"]} | rows)
    return 0 if all(row["ended"] == "done" for row in summary["stages"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    names = "one of them, or all one after another (default)"
    parser.add_argument("--slice", choices=[*SLICES, "all"], default="all", help=names)
    parser.add_argument("--tiny", action="store_true", help="in small, to see whether it works")
    limit = f"of a slice (default: {LIMIT_S:.0f}; none with --tiny, which is for any machine)"
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    return parser


if __name__ == "__main__":
    sys.exit(main())
