"""What a person sees of a run: the header, the live bar, metrics.jsonl, TensorBoard."""

import contextlib
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from mtllm_engine import kernels
from mtllm_engine.config import Config, dumps
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.files import write_text
from mtllm_engine.model.licences import licence_of, public_name
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.model.merge import find_adapters
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.weights import PROJECTION_FILE
from mtllm_engine.progress import Bar, warn
from mtllm_engine.training.checkpoint import Progress
from mtllm_engine.training.closed_form import Fit
from mtllm_engine.training.origins import described
from mtllm_engine.training.step import StepResult
from mtllm_engine.world import AgreedError, World

SHOWN = ("loss", "fvu", "cosine", "accuracy", "pairs_per_s", "data_wait")


class Record:
    """One step, filled in while it runs; its tensors are looked at only when several steps have
    passed.

    `sums_M`, fp64: loss, gradient norm, then the objective's moments.
    """

    def __init__(self, number: int) -> None:
        self.row: dict[str, Any] = {"step": number}
        self.documents: list[dict[str, Any]] = []  # this rank's
        self.started_s = time.perf_counter()

    def data(self, global_batch: GlobalBatch) -> None:
        """The step's data is there; what passed until now was waiting for it."""
        self.row |= {
            "spans": global_batch.totals.spans,
            "student_tokens": global_batch.student_tokens,
            "teacher_tokens": global_batch.teacher_tokens,
            "skipped": global_batch.skipped,
        }
        documents = itertools.chain(*global_batch.micro_batches)
        self.documents = [{"key": each.key, "row": each.row} for each in documents]
        self.wait_s = time.perf_counter() - self.started_s

    def result(self, result: StepResult) -> None:
        self.row["lr"] = result.lr
        first = torch.stack([result.loss.double(), result.grad_norm.double()])
        self.sums_M = torch.cat([first, result.moments])


class RunLog:
    """Collects a run's numbers. Every rank calls it alike; rank 0 shows and writes.

    Args:
        measures: What an objective's moments, summed, come to: names and numbers.
        flops: Of a student and of a teacher token.
        progress: Of the run until now; what is written of later steps is of a killed run, and goes.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        measures: Callable[[torch.Tensor], dict[str, float]],
        flops: tuple[int, int],
        *,
        progress: Progress,
    ) -> None:
        self.config, self.world, self.start = config, world, progress.step
        self.measures, self.flops = measures, flops
        self.bad_steps = progress.bad_steps  # the last so many made no update
        self.folder = Path(config.run.dir)
        self.pending: list[Record] = []
        self.flushed_s = time.perf_counter()

    def __enter__(self) -> "RunLog":
        if self.world.is_main:
            # Slow to import, and only one rank needs it.
            from torch.utils.tensorboard import SummaryWriter

            self.file = _open_after(self.folder / "metrics.jsonl", self.start)
            self.skipped = _open_after(self.folder / "skipped.jsonl", self.start)
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start + 1)
            steps = {"total": self.config.optim.steps, "initial": self.start, "unit": "step"}
            self.bar = Bar(**steps, desc="training", dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.world.is_main:
            self.bar.close()
            self.board.close()
            self.file.close()
            self.skipped.close()
            if not (path := Path(self.skipped.name)).stat().st_size:
                path.unlink()  # a file is there where something was skipped

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Record]:
        """A step to be recorded, the first being number 1.

        Raises:
            ValueError: As `flush`.
        """
        record = Record(number)
        yield record
        self.pending.append(record)
        if number % self.config.run.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Looks at the steps since the last time: one sum over ranks, one wait for the device.

        Raises:
            ValueError: `run.max_bad_steps` in a row made no update.
        """
        if not self.pending:
            return
        sums = torch.stack([record.sums_M for record in self.pending])
        sums[:, 1] /= self.world.size  # the norm is the same on every rank
        sums = self.world.sum(sums).cpu()
        now_s = time.perf_counter()
        step_s = (now_s - self.flushed_s) / len(self.pending)
        rows = [self._finish(record, values, step_s) for record, values in zip(self.pending, sums)]
        records, self.pending, self.flushed_s = self.pending, [], now_s
        if self.world.is_main:
            self._write(rows)
        for record, row in zip(records, rows):
            self._count(record, row)

    def _count(self, record: Record, row: dict[str, Any]) -> None:
        """Notes what a step trained on whose gradient was not finite; the same on every rank."""
        if row["grad_norm"] is not None:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        parts = self.world.gather(record.documents)
        if self.world.is_main:
            documents = list(itertools.chain(*parts))
            self.skipped.write(json.dumps({"step": row["step"], "documents": documents}) + "\n")
            self.skipped.flush()
            warn(f"step {row['step']}: no update, its gradient is not finite")
        if self.bad_steps >= self.config.run.max_bad_steps:
            reason = f"{self.bad_steps} steps in a row, up to {row['step']}, made no update, as"
            reason += " their gradients were not finite"
            fix = f"look at {self.folder / 'skipped.jsonl'}, lower optim.lr and continue"
            # The sums are the same on every rank, so all raise.
            raise AgreedError(ValueError(f"{reason}; {fix}"))

    def measured(self, step: int, row: Mapping[str, Any], message: str) -> None:
        """Writes and says what was measured after `step` steps, which was no training time."""
        self.flushed_s = time.perf_counter()
        if self.world.is_main:
            self._write([{"step": step, **row}])
            self.bar.write(f"step {step}: {message}")

    def _finish(self, record: Record, sums_M: torch.Tensor, step_s: float) -> dict[str, Any]:
        tokens = (record.row["student_tokens"], record.row["teacher_tokens"])
        values = {"loss": sums_M[0].item(), "grad_norm": sums_M[1].item()}
        values |= self.measures(sums_M[2:])
        return record.row | {
            **{name: _finite(value) for name, value in values.items()},
            "pairs_per_s": pair_tokens(*tokens) / step_s,
            "step_s": step_s,
            "data_wait": record.wait_s / step_s,
            "flops": sum(each * count for each, count in zip(self.flops, tokens)),
        }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if key != "step" and value is not None:
                    self.board.add_scalar(key, value, row["step"])
        self.file.flush()
        last = rows[-1]
        if "loss" in last:
            shown = {key: f"{last[key]:.4g}" for key in SHOWN if last.get(key) is not None}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(last["step"] - self.bar.n)


def write_header(
    config: Config,
    world: World,
    stack: Stack,
    tokenizer: PairTokenizer,
    start: int,
    fit: Fit | None,
    layout: str,
) -> None:
    """Writes config.toml and environment.json, and prints what the run is.

    Args:
        start: Steps done before.
        fit: The projection's start, where it was solved for.
        layout: How weights lie on the ranks, in words.
    """
    folder, machine = Path(config.run.dir), environment(world)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.toml", dumps(config))
    write_text(folder / "environment.json", json.dumps(machine, indent=1))
    about = (config, world, stack, tokenizer, start, fit, layout)
    print_table(header(*about, device=machine["device"]))


def header(
    config: Config,
    world: World,
    stack: Stack,
    tokenizer: PairTokenizer,
    start: int,
    fit: Fit | None,
    layout: str,
    *,
    device: str,
) -> dict[str, str]:
    """What a run is, by name; the stack need not be filled. Args: as of `write_header`."""
    folder, model, data = Path(config.run.dir), config.model, config.data
    pack = f"up to {data.pack_tokens} tokens"
    if data.pack_documents:
        pack = f"{data.pack_documents} documents"
    micro_batches = f"micro-batches of up to {config.memory.max_tokens} tokens"
    continued = f" (continued after step {start})" if start else ""
    rows = {
        "run": f"{folder}{continued}",
        "learns": learns(config) + described(Path(model.teacher), model.decoder),
        "starts from": _starts(config),
        "encoder": _encoder(config, stack),
        "decoder": f"{model.decoder} ({'causal' if model.causal else 'bidirectional'})",
        "merged": " then ".join(
            name + described(find_adapters(name), model.decoder) for name in model.adapters
        ),
        "texts": tokenizer.around,
        "projection": str(fit or ""),
        "parameters": _parameters(config, stack),
        "device": f"{world.size} x {device}",
        "weights": layout,
        "step": f"{data.lanes} packs of {pack}, {micro_batches}",
        "corpora": ", ".join(data.train),
        "licences": _licences(config, stack),
        "kernels": _kernels(stack, world.device.type),
    }
    return {name: value for name, value in rows.items() if value}


def learns(config: Config) -> str:
    """What the run does, in words."""
    learner = "the stack" if config.objective.reader == "stack" else "the LLM"
    if config.objective.kind == "finetune":
        return f"{learner}, {config.task.name} in English"
    teacher = f"the LLM of {config.model.teacher}" if config.model.teacher else "the bare LLM"
    states = config.data.teacher_states
    return f"{learner} from {teacher}" + (f", its states stored as {states}" if states else "")


def _encoder(config: Config, stack: Stack) -> str:
    name = config.model.encoder
    if isinstance(stack.encoder, PaddedEncoder):
        return f"{name} (frozen, whole on each rank; {stack.encoder})"
    return f"{name} (frozen)" if stack.reads_stack else "none"


def _starts(config: Config) -> str:
    """What the adapters begin as, in words; "" for new ones."""
    origins, lora = config.model.init_from, config.lora
    has_one = any((Path(origin) / PROJECTION_FILE).is_file() for origin in origins)
    is_new = origins and config.objective.reader == "stack" and not has_one
    projection = ", with a new projection" if is_new else ""
    names = [each + described(Path(each), config.model.decoder) for each in origins]
    if len(origins) < 2:
        return "".join(names) + projection
    learns = f", of which {origins[0]} learns" if lora.train == "first" else ""
    return f"{' + '.join(names)}: adapters of rank {lora.rank}{learns}{projection}"


def _licences(config: Config, stack: Stack) -> str:
    """Of the models and the corpora that are read, which what comes out is bound by too."""
    model = config.model
    models = (*([model.encoder] if stack.reads_stack else []), model.decoder, *model.adapters)
    corpora = {Path(folder).name: Manifest.load(folder).licence for folder in config.data.train}
    licences = {public_name(each): licence_of(each) for each in models} | corpora
    return ", ".join(f"{name}: {licence}" for name, licence in licences.items())


def _parameters(config: Config, stack: Stack) -> str:
    form, sizes = config.model.quantization, {True: 0, False: 0}
    linears = [each for each in stack.modules() if isinstance(each, LoraLinear)]
    weights = [each.weight for each in linears] if form != "none" else []
    # Of bytes, not of numbers; before it is filled a weight is a parameter itself.
    others = {id(getattr(each, "payload", each)) for each in weights}
    for parameter in stack.parameters():
        if id(parameter) not in others:
            sizes[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    if isinstance(stack.encoder, PaddedEncoder):
        sizes[False] += stack.encoder.num_weights
    trained = f"{sizes[True]:,} trained in fp32"
    frozen = f"{sizes[False]:,} frozen in {config.model.dtype}"
    quantised = sum(each.shape.numel() for each in weights)
    return f"{trained}, {frozen}" + (f", {quantised:,} in {form}" if quantised else "")


def _kernels(stack: Stack, device: str) -> str:
    """The ops, by what runs them."""
    ops: dict[str, list[str]] = {}
    offered = kernels.discover() | {"attention": stack.attention}
    if isinstance(stack.encoder, PaddedEncoder):
        del offered["projection"]  # which would norm the states once more
    for name, kernel in offered.items():
        ops.setdefault(kernel.label(device), []).append(name)
    said = [f"{label}: {', '.join(names)}" for label, names in ops.items()]
    if stack.decoder.defers:
        leaves = offered["lora_linear"].label(device).startswith("cuBLAS + triton")
        there = "gate's and up's adapters are added in swiglu"
        said.append(there if leaves else "model.lora_update has no effect")
    return "; ".join(said)


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def pair_tokens(student_tokens: int, teacher_tokens: int) -> float:
    """Pairs of a student and a teacher token, by work: a student token costs twice a teacher token
    (4N : 2N FLOP).
    """
    return (2 * student_tokens + teacher_tokens) / 3


def print_table(rows: Mapping[str, str]) -> None:
    """Names and values, one a line."""
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), flush=True)


def environment(world: World) -> dict[str, Any]:
    """Versions, device and commit, for environment.json."""
    packages = ("torch", "deepspeed", "transformers", "triton", "webdataset")
    packages += ("safetensors", "tokenizers")
    device = f"CPU, {os.cpu_count()} cores"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": device,
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that `pip install git+...` noted, or the checkout's, with a + when files differ
    from it; None where neither is known."""
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        origin = metadata.distribution("mtllm-engine").read_text("direct_url.json") or "{}"
        return json.loads(origin)["vcs_info"]["commit_id"][:12]
    command = ["git", "-C", str(Path(__file__).parent)]
    command += ["describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _open_after(path: Path, step: int) -> TextIO:
    """A file of lines by step, without those that a killed run wrote beyond the checkpoint that is
    continued."""
    lines = path.read_text().splitlines(keepends=True) if step and path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
    return path.open("a")
