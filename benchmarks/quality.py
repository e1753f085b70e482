"""What quantisation costs: how far the teacher moves, and what a short run of training comes to.

    python -m benchmarks.quality CONFIG [section.key=value ...] --quantization none,fp8,nf4 \\
        --out quality.jsonl

Everything is measured on the documents of `validation.corpus`, beside the teacher in fp32. CONFIG's
run is made once for each quantisation, in a folder that is thrown away. `make quickstart` leaves
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
from mtllm_engine import config as configs
from mtllm_engine.config import Config, ModelConfig
from mtllm_engine.data.stream import build_stream, each_step
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.lora import LoraLinear, quantised_weights
from mtllm_engine.train import train
from mtllm_engine.training import checkpoint
from mtllm_engine.training.engine import build_engine, shard
from mtllm_engine.training.log import environment
from mtllm_engine.world import World, connect

QUANTIZATIONS = typing.get_args(typing.get_type_hints(ModelConfig)["quantization"])
PLAIN = ["zero.stage=0", "checkpoint.keep=1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """Pooled states of every document of `validation.corpus`, fp32 on the CPU, in one order."""

    student_PD: torch.Tensor
    teacher_PD: torch.Tensor
    num_bytes: int  # of what holds the LLM's linears
    num_weights: int


def measure(config: Config, world: World, trained: checkpoint.TrainedState | None = None) -> States:
    """Args: trained: what a run has learned; None: its start."""
    stack, weights = build_stack(config)
    engine = build_engine(config, shard(stack, weights, config, world), world)
    if trained is not None:
        engine.load_trained_state(trained, updates=0)
    tokenizer = build_tokenizer(config, stack)
    options = {"seed": config.run.seed, "corpus": config.validation.corpus}
    stream = build_stream(config.data, tokenizer, world, **options)
    pooled = []
    with engine.evaluating():
        for global_batch in each_step(stream, world, config.memory.max_tokens):
            for documents, batch in global_batch.batches(world.device):
                outputs, num = stack(batch, global_batch.totals).outputs, len(documents)
                pooled.append((outputs.student_PD[:num].cpu(), outputs.teacher_PD[:num].cpu()))
    student_PD, teacher_PD = (torch.cat(states) for states in zip(*pooled))
    linears = [item.weight for item in stack.decoder.modules() if isinstance(item, LoraLinear)]
    quantised = quantised_weights(stack)
    return States(
        student_PD=student_PD,
        teacher_PD=teacher_PD,
        num_bytes=sum(each.num_bytes for each in quantised) or sum(each.nbytes for each in linears),
        num_weights=sum(each.shape.numel() for each in linears),
    )


def learn(config: Config, world: World) -> checkpoint.TrainedState:
    """What the config's run has learned at its end."""
    with tempfile.TemporaryDirectory() as folder:
        steps = config.optim.steps
        run = dataclasses.replace(config.run, dir=folder, log_every=steps)
        validation = dataclasses.replace(config.validation, every=steps)
        train(dataclasses.replace(config, run=run, validation=validation), world)
        return checkpoint.load_tensors(checkpoint.latest(Path(folder) / "checkpoints"))


def compare(config: Config, reference: States, world: World) -> dict[str, Any]:
    """A quantisation's row. `fvu` is of its own teacher, `fvu_full` of the fp32 one, which users
    have in mind."""
    states = measure(config, world, learn(config, world))
    teacher_PD, full_PD = states.teacher_PD, reference.teacher_PD
    drift_PD = (teacher_PD - full_PD).double()
    return {
        "quantization": config.model.quantization,
        "dtype": config.model.dtype,
        "documents": len(teacher_PD),
        "steps": config.optim.steps,
        "bytes_per_weight": states.num_bytes / states.num_weights,
        "teacher_error": (drift_PD.norm() / full_PD.double().norm()).item(),
        "teacher_cosine": torch.cosine_similarity(teacher_PD, full_PD, dim=1).mean().item(),
        "teacher_fvu": fvu(teacher_PD, full_PD),
        "fvu": fvu(states.student_PD, teacher_PD),
        "fvu_full": fvu(states.student_PD, full_PD),
    }


def fvu(states_PD: torch.Tensor, target_PD: torch.Tensor) -> float:
    """Fraction of the target's variance that is unexplained."""
    states_PD, target_PD = states_PD.double(), target_PD.double()
    return (
        (states_PD - target_PD).square().sum() / (target_PD - target_PD.mean(0)).square().sum()
    ).item()


def show(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    run = f"{first['documents']} documents, {first['steps']} steps"
    print(f"\n{first['device']}, {run}, commit {first['commit']}")
    print(
        "teacher: beside the one in fp32; FVU of the student: of its own teacher, and of that one"
    )
    columns = {"bytes/weight": "bytes_per_weight", "teacher error": "teacher_error"}
    columns |= {"teacher FVU": "teacher_fvu", "FVU": "fvu", "FVU, full teacher": "fvu_full"}
    lines = []
    for row in rows:
        line = {"quantization": f"{row['quantization']} ({row['dtype']})"}
        line |= {title: f"{row[key]:.4g}" for title, key in columns.items()}
        lines.append(line | {"1 - cosine": f"{1 - row['teacher_cosine']:.1e}"})
    print(table(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.quality`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_intermixed_args(words)
    kinds = arguments.quantization.split(",")
    try:
        settings = [[*arguments.overrides, *PLAIN, f"model.quantization={kind}"] for kind in kinds]
        runs = [configs.load(arguments.config, overrides) for overrides in settings]
        exact = [*arguments.overrides, *PLAIN, "model.quantization=none", "model.dtype=float32"]
        exact = configs.load(arguments.config, exact)
        if not exact.validation.corpus:
            raise ValueError("validation.corpus is empty: it names the documents to measure on")
        world = connect()
        reference, rows = measure(exact, world), []
        machine = environment(world) | {
            "command": " ".join(["python -m benchmarks.quality", *words])
        }
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
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality", description="What quantisation costs."
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    known = ",".join(QUANTIZATIONS)
    parser.add_argument("--quantization", default=known, help=f"some of {known} (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON line for each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
