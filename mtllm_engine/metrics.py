"""What a person sees of a run: the header, the live bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mtllm_engine.config import Config
from mtllm_engine.data.stream import Step
from mtllm_engine.probe import Agreement, average
from mtllm_engine.tasks import ENGLISH
from mtllm_engine.world import Agreed, World

SHOWN = ("loss", "fvu", "cosine", "accuracy", "pairs_per_s", "data_wait")


class Record:
    """One step, filled in while it runs; its tensors are looked at only when several steps have passed."""

    def __init__(self, step: int) -> None:
        self.row: dict[str, Any] = {"step": step + 1}
        self.sums: torch.Tensor | None = None  # fp64: loss, gradient norm, then the objective's moments
        self.started_s = time.perf_counter()

    def data(self, step: Step) -> None:
        """The step's data is there; what passed until now was waiting for it."""
        self.row |= {
            "spans": step.totals.spans,
            "student_tokens": step.student_tokens,
            "teacher_tokens": step.teacher_tokens,
            "skipped": step.skipped,
        }
        self.wait_s = time.perf_counter() - self.started_s

    def result(self, loss: torch.Tensor, grad_norm: torch.Tensor, moments: torch.Tensor, lr: float) -> None:
        """Args: loss, moments: this rank's share. grad_norm: the same on every rank."""
        self.row["lr"] = lr
        self.sums = torch.cat([torch.stack([loss.double(), grad_norm.double()]), moments])


class Metrics:
    """Collects a run's numbers. Every rank calls it alike; rank 0 shows and writes.

    Args:
        measures: What an objective's moments, summed, come to: names and numbers.
        flops: Of a student and of a teacher token.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        measures: Callable[[torch.Tensor], dict[str, float]],
        flops: tuple[int, int],
        *,
        start: int,
    ) -> None:
        self.config, self.world, self.measures, self.flops, self.start = config, world, measures, flops, start
        self.folder = Path(config.run.dir)
        self.pending: list[Record] = []
        self.flushed_s = time.perf_counter()

    def __enter__(self) -> "Metrics":
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

            self.file = _open_after(self.folder / "metrics.jsonl", self.start)
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start + 1)
            self.bar = tqdm(total=self.config.optim.steps, initial=self.start, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.world.is_main:
            self.bar.close()
            self.board.close()
            self.file.close()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Record]:
        """A step to be recorded. Raises: ValueError: the loss of a step since the last look is not finite."""
        record = Record(step)
        yield record
        self.pending.append(record)
        if (step + 1) % self.config.run.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Looks at the steps since the last time: one sum over ranks, one wait for the device."""
        if not self.pending:
            return
        sums = torch.stack([record.sums for record in self.pending])
        sums[:, 1] /= self.world.size  # the norm is the same on every rank
        sums = self.world.sum(sums).cpu()
        now_s = time.perf_counter()
        step_s = (now_s - self.flushed_s) / len(self.pending)
        rows = [self._finish(record, values, step_s) for record, values in zip(self.pending, sums)]
        self.pending, self.flushed_s = [], now_s
        if self.world.is_main:
            self._write(rows)
        for row in rows:
            if row["loss"] - row["loss"] != 0:
                told = f"the loss of step {row['step']} is {row['loss']}; lower optim.lr and continue"
                raise Agreed(ValueError(told))  # the sum is the same on every rank, so all raise

    def validation(self, step: int, moments: torch.Tensor, documents: int) -> float:
        """A held-out result after `step` steps; returns its score: the accuracy if there is one, else -FVU.

        Args:
            moments: Summed over ranks.
        """
        self.flushed_s = time.perf_counter()  # the time since the last flush was not training
        measured = self.measures(moments)
        if self.world.is_main:
            held_out = {f"validation_{name}": value for name, value in measured.items()}
            self._write([{"step": step, **held_out, "validation_documents": documents}])
            self.bar.write(
                f"step {step}: held-out " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items())
            )
        return measured.get("accuracy", -measured.get("fvu", 0.0))

    def probe(self, step: int, agreements: Mapping[str, Agreement], num_lines: int) -> None:
        """What the cross-lingual probe says after `step` steps, by language and on average; the same on every rank."""
        self.flushed_s = time.perf_counter()  # as in `validation`
        if self.world.is_main:
            mean = asdict(average(agreements))
            row = {f"probe_{name}": value for name, value in mean.items()} | {"probe_lines": num_lines}
            for language, agreement in agreements.items():
                row |= {f"probe_{name}/{language}": value for name, value in asdict(agreement).items()}
            self._write([{"step": step, **row}])
            told = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
            num_foreign = len(agreements.keys() - {ENGLISH})
            self.bar.write(f"step {step}: probe, {num_lines} lines in {num_foreign} languages: {told}")

    def _finish(self, record: Record, sums: torch.Tensor, step_s: float) -> dict[str, Any]:
        pairs = pair_tokens(record.row["student_tokens"], record.row["teacher_tokens"])
        return record.row | {
            "loss": sums[0].item(),
            "grad_norm": sums[1].item(),
            **self.measures(sums[2:]),
            "pairs_per_s": pairs / step_s,
            "step_s": step_s,
            "data_wait": record.wait_s / step_s,
            "flops": self.flops[0] * record.row["student_tokens"] + self.flops[1] * record.row["teacher_tokens"],
        }

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if key != "step":
                    self.board.add_scalar(key, value, row["step"])
        self.file.flush()
        if "loss" in rows[-1]:
            self.bar.set_postfix({key: f"{rows[-1][key]:.4g}" for key in SHOWN if key in rows[-1]}, refresh=False)
            self.bar.update(rows[-1]["step"] - self.bar.n)


def pair_tokens(student_tokens: int, teacher_tokens: int) -> float:
    """Pairs of a student and a teacher token, by work: a student token costs twice a teacher token (4N : 2N FLOP)."""
    return (2 * student_tokens + teacher_tokens) / 3


def print_table(rows: Mapping[str, str]) -> None:
    """Names and values, one a line."""
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), flush=True)


def environment(world: World) -> dict[str, Any]:
    """Versions, device and commit, for environment.json."""
    packages = ("torch", "deepspeed", "transformers", "triton", "webdataset", "safetensors", "tokenizers")
    gpu = world.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name(world.device) if gpu else f"CPU, {os.cpu_count()} cores",
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _open_after(path: Path, step: int):
    """metrics.jsonl, without the lines that a killed run wrote beyond the checkpoint that is continued."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step] if step else []
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return path.open("a")
