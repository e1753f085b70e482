"""What a quantised base costs: how far the teacher moves, and what a short run of training comes to on it.

    python -m benchmarks.quality CONFIG [section.key=value ...] --base full,fp8,nf4 --out quality.jsonl

Everything is measured on the documents of `data.validation`, beside the teacher on the full base in fp32. CONFIG's run
is made once for each base, in a folder that is thrown away. `make quickstart` leaves
runs/quickstart/run/stage1.toml and all that it names.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import table
from mtllm_engine import checkpoint
from mtllm_engine import config as configs
from mtllm_engine.config import Config, ModelConfig
from mtllm_engine.data.batch import collate
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.engine import build_engine, shard
from mtllm_engine.metrics import environment
from mtllm_engine.model.lora import LoraLinear, quantised_weights
from mtllm_engine.model.pretrained import build_stack, build_tokenizer
from mtllm_engine.train import train
from mtllm_engine.world import World, connect

BASES = typing.get_args(typing.get_type_hints(ModelConfig)["base"])
PLAIN = ["zero.stage=0", "checkpoint.keep=1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """Pooled states of every document of `data.validation`, fp32 on the CPU, always in one order."""

    student_PD: torch.Tensor
    teacher_PD: torch.Tensor
    base_bytes: int  # what holds the LLM's linears
    base_weights: int


def measure(config: Config, world: World, trained: checkpoint.TrainedState | None = None) -> States:
    """Args: trained: what a run has learned; None: its start."""
    stack, weights = build_stack(config)
    engine = build_engine(config, shard(stack, weights, config, world), world)
    if trained is not None:
        engine.load_trained_state(trained, step=0)
    tokenizer = build_tokenizer(config, stack)
    stream = build_stream(config.data, tokenizer, world, seed=config.run.seed, epochs=1)
    pooled = []
    with engine.evaluating():
        while (work := agree(stream, world, config.memory.max_tokens)).totals.documents:
            for documents in work.micro_batches:
                outputs = stack(collate(documents, step_seed=0, device=world.device), work.totals).outputs
                pooled.append((outputs.student_PD.cpu(), outputs.teacher_PD.cpu()))
    stream.close()
    student_PD, teacher_PD = (torch.cat(states) for states in zip(*pooled))
    linears = [item.weight for item in stack.decoder.modules() if isinstance(item, LoraLinear)]
    quantised = quantised_weights(stack)
    return States(
        student_PD=student_PD,
        teacher_PD=teacher_PD,
        base_bytes=sum(weight.num_bytes for weight in quantised) or sum(weight.nbytes for weight in linears),
        base_weights=sum(weight.shape.numel() for weight in linears),
    )


def learn(config: Config, world: World) -> checkpoint.TrainedState:
    """What the config's run has learned at its end."""
    with tempfile.TemporaryDirectory() as folder:
        steps = config.optim.steps
        run = dataclasses.replace(config.run, dir=folder, validate_every=steps, log_every=steps)
        train(dataclasses.replace(config, run=run), world)
        return checkpoint.load_tensors(checkpoint.latest(Path(folder) / "checkpoints"))


def compare(config: Config, reference: States, world: World) -> dict[str, Any]:
    """A base's row. `fvu` is of the base's own teacher, `fvu_full` of the full fp32 one, which users have in mind."""
    found = measure(config, world, learn(config, world))
    drift_PD = (found.teacher_PD - reference.teacher_PD).double()
    return {
        "base": config.model.base,
        "dtype": config.model.dtype,
        "documents": len(found.teacher_PD),
        "steps": config.optim.steps,
        "bytes_per_weight": found.base_bytes / found.base_weights,
        "teacher_error": (drift_PD.norm() / reference.teacher_PD.double().norm()).item(),
        "teacher_cosine": torch.cosine_similarity(found.teacher_PD, reference.teacher_PD, dim=1).mean().item(),
        "teacher_fvu": fvu(found.teacher_PD, reference.teacher_PD),
        "fvu": fvu(found.student_PD, found.teacher_PD),
        "fvu_full": fvu(found.student_PD, reference.teacher_PD),
    }


def fvu(states_PD: torch.Tensor, target_PD: torch.Tensor) -> float:
    """Fraction of the target's variance that is unexplained."""
    states_PD, target_PD = states_PD.double(), target_PD.double()
    return ((states_PD - target_PD).square().sum() / (target_PD - target_PD.mean(0)).square().sum()).item()


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"\n{rows[0]['device']}, {rows[0]['documents']} documents, {rows[0]['steps']} steps, commit {rows[0]['commit']}"
    )
    print("teacher: beside the full base in fp32; FVU of the student: of its own teacher, and of the full fp32 one")
    columns = {"bytes/weight": "bytes_per_weight", "teacher error": "teacher_error", "teacher FVU": "teacher_fvu"}
    columns |= {"FVU": "fvu", "FVU, full teacher": "fvu_full"}
    print(
        table(
            [
                {"base": f"{row['base']} ({row['dtype']})"}
                | {title: f"{row[key]:.4g}" for title, key in columns.items()}
                | {"1 - cosine": f"{1 - row['teacher_cosine']:.1e}"}
                for row in rows
            ]
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.quality`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_intermixed_args(words)
    bases = arguments.base.split(",")
    try:
        settings = [[*arguments.overrides, *PLAIN, f"model.base={base}"] for base in bases]
        runs = [configs.load(arguments.config, overrides) for overrides in settings]
        exact = [*arguments.overrides, *PLAIN, "model.base=full", "model.dtype=float32"]
        exact = configs.load(arguments.config, exact)
        if not exact.data.validation:
            raise ValueError("data.validation is empty: it names the documents to measure on")
        world = connect()
        reference, rows = measure(exact, world), []
        machine = environment(world) | {"command": " ".join(["python -m benchmarks.quality", *words])}
        for config in runs:
            rows.append(compare(config, reference, world) | machine)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except (ValueError, OSError) as error:
        print("benchmarks.quality: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    world.close()
    show(rows)
    return int(not all(math.isfinite(row["fvu"]) for row in rows))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description="What a quantised base costs.")
    parser.add_argument("config", metavar="CONFIG", help="TOML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--base", default=",".join(BASES), help=f"some of {', '.join(BASES)}, with commas (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON line for each base")
    return parser


if __name__ == "__main__":
    sys.exit(main())
