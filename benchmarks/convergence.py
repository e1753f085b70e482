"""FVU by step beside a plain padded PyTorch loop: the same models, start, documents and settings.

    python -m benchmarks.convergence CONFIG [section.key=value ...] [--steps N] [--out FILE.jsonl]

CONFIG distils from the bare LLM, such as the stage1.toml of a recipe's folder. Its training is run
step by step in turns, so that all see the same machine: by ours; by `padded`, the loop that one
writes by hand of transformers and PEFT; by `padded sorted`, the same loop, with a step's documents
sorted by length and in small micro-batches; and where model.dtype is bfloat16, by `padded fp32`,
the same loop with the same weights and no rounding to bf16. What lies between loops is what
rounding does to this training, and ours should lie no farther away.
"""

import argparse
import copy
import functools
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks import measure
from benchmarks.baselines import BATCH, Distillation, build_distillation, pad_documents
from benchmarks.models import Models
from benchmarks.quality import fvu
from benchmarks.tables import table
from mtllm_engine import config as configs
from mtllm_engine.config import Config, flatten
from mtllm_engine.data.batch import Document
from mtllm_engine.data.stream import GlobalBatch, Stream, agree
from mtllm_engine.files import write_text
from mtllm_engine.model.build import build_stack, build_tokenizer, read_encoder
from mtllm_engine.model.families import read_config
from mtllm_engine.model.tensors import resolve
from mtllm_engine.train import open_stream, prepare
from mtllm_engine.training.closed_form import fit_projection
from mtllm_engine.training.engine import PlainEngine, build_engine, shard
from mtllm_engine.training.log import environment
from mtllm_engine.training.step import learning_rate, train_step
from mtllm_engine.world import World, connect

OURS, LOOP, AGAIN, EXACT = "ours", "padded", "padded sorted", "padded fp32"
SMALL_BATCH = 8  # documents of a micro-batch of the sorted loop
WARM_UP = 2  # steps whose time does not count
SHOWN = (0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # steps in the table; the last one too
OUT = Path("benchmarks/results/cpu/convergence.jsonl")
PLAIN = {
    "lora.dropout": 0.0,  # ours and PEFT's would drop others
    "objective.kind": "distil",
    "objective.token_weight": 0.0,
    "model.quantization": "none",
    "model.init_from": (),
    "model.teacher": "",
    "data.teacher_states": "",
    "data.parts": "whole",
    "task.train": "",
}
"""What the loop can do; it has nothing for other values."""

FACTOR = 2  # ours may be so many times as far from the reference as a loop
NEGLIGIBLE = 1e-5  # of an FVU: nobody minds, whatever rounding does

Row = dict[str, Any]


class Result(NamedTuple):
    """What a step measured before its update."""

    loss: float
    fvu: float


@dataclass(frozen=True, kw_only=True)
class Ours:
    """`train_step`, as training calls it."""

    config: Config
    world: World
    engine: PlainEngine
    name: str = OURS

    def run(self, global_batch: GlobalBatch, step: int) -> Result:
        result = train_step(self.config, self.world, self.engine, global_batch, step)
        measures = self.engine.stack.objective.measures(result.moments)
        return Result(result.loss.item(), measures["fvu"])

    def padding(self, global_batch: GlobalBatch) -> int:
        """Its LLM reads none."""
        return 0


class Loop:
    """Pad, run the LLM twice, AdamW.

    Args:
        batch: Documents of a micro-batch.
        by_length: A step's documents are sorted; else they stay as they come.
        exact: Frozen weights and all that is computed are in fp32.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        models: Models,
        world: World,
        *,
        batch: int = BATCH,
        by_length: bool = False,
        exact: bool = False,
    ) -> None:
        self.name, self.optim = name, config.optim
        self.batch, self.by_length = batch, by_length
        self.module: Distillation = build_distillation(config, models, world, packed=False)[0]
        if exact:
            self.module.encoder = copy.deepcopy(self.module.encoder)  # it may be ours
            self.module.float().dtype = torch.float32
        self.trained = [each for each in self.module.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            betas=self.optim.betas,
            eps=self.optim.eps,
            weight_decay=self.optim.weight_decay,
            fused=True,
        )
        self.pad = functools.partial(
            pad_documents,
            pad=models.encoder.pad_token_id,
            causal=config.model.causal,
            device=world.device,
        )

    def run(self, global_batch: GlobalBatch, step: int) -> Result:
        loss, pooled = 0.0, []
        for documents in self.batches(global_batch):
            student = self.pad([document.student_ids_S for document in documents])
            teacher = self.pad([document.teacher_ids_T for document in documents])
            student_PD, teacher_PD = self.module.pooled(student, teacher)
            share = len(documents) / global_batch.totals.documents
            part = share * functional.mse_loss(student_PD, teacher_PD)
            part.backward()
            loss += part.detach()
            pooled.append((student_PD.detach(), teacher_PD))
        nn.utils.clip_grad_norm_(self.trained, self.optim.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Result(loss.item(), fvu(*map(torch.cat, zip(*pooled))))

    def batches(self, global_batch: GlobalBatch) -> list[list[Document]]:
        documents = list(itertools.chain(*global_batch.micro_batches))
        if self.by_length:
            documents.sort(key=lambda document: document.num_tokens)
        starts = range(0, len(documents), self.batch)
        return [documents[start : start + self.batch] for start in starts]

    def padding(self, global_batch: GlobalBatch) -> int:
        """Tokens of the LLM's that are padding, on both sides."""
        count = 0
        for documents in self.batches(global_batch):
            for name in ("student_ids_S", "teacher_ids_T"):
                lengths = [len(getattr(document, name)) for document in documents]
                count += len(lengths) * max(lengths) - sum(lengths)
        return count


def build_variants(config: Config, world: World) -> tuple[list[Ours | Loop], Stream]:
    """All of them before their first step, and what they read.

    Raises:
        ValueError: As training.
    """
    stack, weights = build_stack(config)
    tokenizer = build_tokenizer(config, stack)
    if config.model.projection_init == "least_squares":
        weights.starts |= fit_projection(config, world, stack, weights, tokenizer).values
    engine = build_engine(config, shard(stack, weights, config, world), world)
    models = Models(
        encoder=read_encoder(resolve(config.model.encoder)),
        decoder=read_config(resolve(config.model.decoder), "model.decoder").get_text_config(),
        stack=stack,
        weights=weights,
        trained={
            name: {"value": parameter.detach()}
            for name, parameter in stack.named_parameters()
            if parameter.requires_grad
        },
    )
    parts = (config, models, world)
    variants = [
        Ours(config=config, world=world, engine=engine),
        Loop(LOOP, *parts),
        Loop(AGAIN, *parts, batch=SMALL_BATCH, by_length=True),
    ]
    if config.model.dtype != "float32":
        variants.append(Loop(EXACT, *parts, exact=True))
    return variants, open_stream(config, tokenizer, world)


def compare(config: Config, world: World, steps: int) -> Iterator[Row]:
    """A row for each step; every variant runs it before any runs the next, in turning order.

    Raises:
        ValueError: As training.
    """
    variants, stream = build_variants(config, world)
    names = [variant.name for variant in variants]
    for step in range(steps):
        global_batch = agree(stream, world, config.memory.max_tokens)
        results, seconds = {}, {}
        turn = step % len(variants)
        for variant in [*variants[turn:], *variants[:turn]]:
            run = functools.partial(variant.run, global_batch, step)
            results[variant.name], seconds[variant.name] = measure.timed(run, world)
        yield {
            "step": step,
            "documents": global_batch.totals.documents,
            "tokens": global_batch.student_tokens + global_batch.teacher_tokens,
            "padding": {variant.name: variant.padding(global_batch) for variant in variants},
            "lr": learning_rate(config.optim, step),
            "loss": {name: results[name].loss for name in names},
            "fvu": {name: results[name].fvu for name in names},
            "seconds": {name: seconds[name] for name in names},
        }
    stream.close()


def differences(rows: Sequence[Row], name: str, reference: str) -> list[float]:
    """Of a variant's FVU from the reference's, by step, relative to that."""
    return [row["fvu"][name] / row["fvu"][reference] - 1 for row in rows]


def distances(rows: Sequence[Row]) -> dict[str, float]:
    """The root mean square of each variant's differences from the loop that rounds least."""
    return {
        name: statistics.fmean(each**2 for each in differences(rows, name, _reference(rows))) ** 0.5
        for name in rows[0]["fvu"]
    }


def is_same(rows: Sequence[Row]) -> bool:
    """Ours lies about as near to that loop as those that are rounded otherwise."""
    apart = distances(rows)
    return apart[OURS] <= max(FACTOR * max(apart[LOOP], apart[AGAIN]), NEGLIGIBLE)


def report(rows: Sequence[Row], about: Row) -> str:
    """What a person reads, in Markdown."""
    reference, apart = _reference(rows), distances(rows)
    return f"""# FVU by step, beside a plain padded loop

{about["device"]}, commit {about["commit"]}: `{about["command"]}`

{about["encoder"]} under {about["decoder"]}, {about["dtype"]}; the first {len(rows)} of \
{about["steps"]} steps, {rows[0]["documents"]} documents each. FVU of a step's documents before its
update. `{AGAIN}` is the same loop, a step's documents sorted by length and in micro-batches of
{SMALL_BATCH}; `{EXACT}`, beside a training in bf16, is the same loop with the same weights, which
computes in fp32.

```
{table(_by_step(rows))}
```

From `{reference}` {OURS} is {apart[OURS]:.1e} of the FVU away, `{LOOP}` {apart[LOOP]:.1e} and \
`{AGAIN}` {apart[AGAIN]:.1e} (root mean square over
all steps): {"" if is_same(rows) else "not "}the same to rounding.

```
{table(_by_variant(rows))}
```

Seconds of a step, and their ratio in each: median and p20-p80 of steps \
{_timed(rows)[0]["step"]} and later, data apart.
Padding: of the tokens that the LLM reads, on both sides. Largest difference: from `{reference}`, \
of its FVU.
"""


def _reference(rows: Sequence[Row]) -> str:
    return EXACT if EXACT in rows[0]["fvu"] else LOOP


def _by_step(rows: Sequence[Row]) -> list[dict[str, str]]:
    lines = []
    for row in rows:
        if row["step"] in SHOWN or row is rows[-1]:
            line = {"step": str(row["step"])}
            line |= {name: f"{fvu:.5f}" for name, fvu in row["fvu"].items()}
            line[f"{OURS} / {LOOP} - 1"] = f"{differences([row], OURS, LOOP)[0]:+.1e}"
            lines.append(line)
    return lines


def _by_variant(rows: Sequence[Row]) -> list[dict[str, str]]:
    lines, timed = [], _timed(rows)
    for name in rows[0]["fvu"]:
        step_s = measure.spread([row["seconds"][name] for row in timed])
        gain = measure.spread([row["seconds"][name] / row["seconds"][OURS] for row in timed])
        apart = [abs(value) for value in differences(rows, name, _reference(rows))]
        padding = sum(row["padding"][name] for row in rows)
        line = {
            "variant": name,
            "step s": f"{step_s['median']:.3f}",
            "p20-p80": f"{step_s['p20']:.3f}-{step_s['p80']:.3f}",
            "ours is": f"{gain['median']:.2f} x",
            "of each step": f"{gain['p20']:.2f}-{gain['p80']:.2f} x",
            "padding": f"{padding / (padding + sum(row['tokens'] for row in rows)):.0%}",
            "largest difference": f"{max(apart):.1e} (step {apart.index(max(apart))})",
        }
        lines.append(line)
    return lines


def _timed(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[WARM_UP:] or rows


def draw(rows: Sequence[Row], about: Row, path: Path) -> None:
    """The curves on top of one another; below, how far they are from the loop's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [row["step"] for row in rows]
    styles = {OURS: {"linewidth": 5, "alpha": 0.35}, LOOP: {"color": "black", "linewidth": 1}}
    styles[AGAIN] = {"linestyle": "--", "linewidth": 1}
    reference = _reference(rows)
    for name, style in (styles | {EXACT: {"color": "gray", "linewidth": 1}}).items():
        if name in rows[0]["fvu"]:
            above.plot(steps, [row["fvu"][name] for row in rows], label=name, **style)
            apart = [100 * value for value in differences(rows, name, reference)]
            below.plot(steps, apart, **style)
    above.set_yscale("log")
    above.set_ylabel("FVU of a step's documents")
    above.legend(frameon=False)
    below.set(xlabel="step", ylabel=f"from {reference}, % of its FVU")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    models = f"{about['encoder']} under {about['decoder']}, {about['dtype']}"
    figure.suptitle(f"{models}; {about['device']}, commit {about['commit']}", fontsize=9)
    figure.savefig(path, dpi=150)


def run(config: Config, world: World, steps: int, out: Path, command: str) -> int:
    """Measures and writes a line of JSON for each step as it is done, then report and picture.

    Returns:
        3 where ours is not the same to rounding.
    """
    about = environment(world) | {
        "command": command,
        "driver": measure.driver(world.device),
        "threads": torch.get_num_threads(),
        "encoder": Path(config.model.encoder).name,
        "decoder": Path(config.model.decoder).name,
        "dtype": config.model.dtype,
        "steps": config.optim.steps,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with out.open("w") as file, tqdm(total=steps, unit="step") as bar:
        file.write(json.dumps(about) + "\n")
        for row in compare(config, world, steps):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.set_postfix({name: f"{fvu:.4f}" for name, fvu in row["fvu"].items()}, refresh=False)
            bar.update()
    text = report(rows, about)
    write_text(out.with_suffix(".md"), text)
    draw(rows, about, out.with_suffix(".png"))
    print(f"\n{text}\n{', '.join(str(out.with_suffix(end)) for end in ('.md', '.png'))}, {out}")
    return 0 if is_same(rows) else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.convergence`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_intermixed_args(words)
    deprecated = "`is_gradient_checkpointing`"  # PEFT reads it
    warnings.filterwarnings("ignore", category=FutureWarning, message=deprecated)
    try:
        config = _configure(arguments)
        steps = config.optim.steps if arguments.steps is None else arguments.steps
        if not 1 <= steps <= config.optim.steps:
            raise ValueError(f"--steps {steps}: the training has {config.optim.steps}")
        world = connect()
        command = f"python -m benchmarks.convergence {' '.join(words)}"
        status = run(config, world, steps, arguments.out.with_suffix(".jsonl"), command)
    except (ValueError, OSError) as error:
        print("benchmarks.convergence: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    world.close()
    return status


def _configure(arguments: argparse.Namespace) -> Config:
    """The user's config on one rank in plain PyTorch, its epochs counted in steps.

    Raises:
        ValueError: It asks for what the loop does not have.
    """
    config = configs.load(arguments.config, [*arguments.overrides, "zero.stage=0"])
    values = flatten(config)
    for key, plain in PLAIN.items():
        if values[key] != plain:
            reason = "masks differ" if key == "lora.dropout" else "the loop has no such thing"
            raise ValueError(f"{key}={values[key]}: {reason}; set {key}={json.dumps(plain)}")
    return prepare(config)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.convergence", description="FVU by step beside a plain padded loop."
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="TOML file, as for training")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--steps", type=int, metavar="N", help="the first so many (default: the whole training)")
    files = f"a JSON line for each step, .md and .png beside it (default: {OUT})"
    add("--out", type=Path, default=OUT, metavar="FILE", help=files)
    return parser


if __name__ == "__main__":
    sys.exit(main())
