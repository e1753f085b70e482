"""A whole optimizer step of ours beside what people use today: same documents, weights, adapters.

    python -m benchmarks.step CONFIG [section.key=value ...] --baseline all \\
        --lengths 350,40,equal --out step.jsonl
    deepspeed --num_gpus 8 --module benchmarks.step CONFIG ...     # the same under ZeRO-3
    ... --beside model.quantization=fp8 --beside zero.stage=0     # and ours configured otherwise
    python -m benchmarks.step --scaling step-1.jsonl step-8.jsonl  # efficiency over rank counts

The learning rate is 0: the optimizer does all its work, yet every variant sees the same weights in
every step, so that losses and gradient norms are compared in all of them. Where they differ there
is one line, and no figure.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure, profile, tables
from benchmarks.baselines import Baseline, build_baselines
from benchmarks.documents import Drawn, Lengths, parse_lengths
from benchmarks.fair import STEPS, sweep
from benchmarks.measure import Part, Variant
from benchmarks.models import Models, build_models
from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.data.stream import GlobalBatch, agree, build_stream
from mtllm_engine.model.build import build_tokenizer
from mtllm_engine.model.decoder import DecoderLayer
from mtllm_engine.training.engine import PlainEngine, ZeroEngine, build_engine
from mtllm_engine.training.launch import launched_words, tell
from mtllm_engine.training.log import environment, pair_tokens
from mtllm_engine.training.step import train_step
from mtllm_engine.world import AgreedError, World, connect

# Of losses and norms, relative: sums of many roundings, none larger.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Between ours, quantised, and baselines, which are not.
QUANTISED = {"none": 0.0, "fp8": 0.1, "nf4": 0.3}
BASELINES = ("padded", "unpadded", "all")
WARM_UP = 2  # steps: allocators, autotuning and DeepSpeed's prefetch trace settle
SIZES = tuple(2**power for power in range(11, 16))  # pack tokens of --linear


@dataclasses.dataclass(kw_only=True)
class Ours:
    """`train_step`, as training calls it, at the learning rate 0 that ends the schedule."""

    config: Config
    world: World
    engine: PlainEngine | ZeroEngine
    module: nn.Module
    name: str = "ours"

    def run(self, global_batch: GlobalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        last = self.config.optim.steps
        result = train_step(self.config, self.world, self.engine, global_batch, last)
        assert result.lr == 0
        return result.loss, result.grad_norm

    @property
    def padding(self) -> float:
        return getattr(self.module.encoder, "padding", 0.0)

    @property
    def parts(self) -> list[Part]:
        return [
            (self.module.encoder, "forward", "encoder"),
            (DecoderLayer, "_run", lambda _, hidden, stream: ("teacher", "student")[stream.grad]),
            (self.engine, "backward", "backward"),
            (self.engine, "step", "optimizer"),
        ]


class Check:
    """Compares a step's loss and gradient norm with those of the variant that ran it first."""

    def __init__(self, dtype: str, world: World, quantised: Mapping[str, str]) -> None:
        """Args: quantised: How variants hold the LLM, of those that are not baselines."""
        self.tolerance, self.world = TOLERANCE[dtype], world
        self.tolerances = {name: QUANTISED[form] for name, form in quantised.items()}
        self.first: dict[int, tuple[str, list[float]]] = {}
        self.worst: dict[str, float] = {}

    def __call__(self, name: str, step: int, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Raises: ValueError: They differ; on every rank alike."""
        values = [self.world.sum(result[0].clone()).item(), result[1].item()]
        other, expected = self.first.setdefault(step, (name, values))
        both = [self.tolerances.get(each, 0.0) for each in (name, other)]
        tolerance = max(self.tolerance, *both)
        for kind, value, wanted in zip(("loss", "gradient norm"), values, expected):
            error = abs(value - wanted) / abs(wanted)
            self.worst[name] = max(self.worst.get(name, 0.0), error)
            if not error <= tolerance:
                values = f"the {kind} of {name} is {value:.6g}, that of {other} {wanted:.6g}"
                apart = f"{error:.1e} apart, above {tolerance:.0e}: no figures"
                raise AgreedError(ValueError(f"step {step}: {values}; {apart}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The models and everything that runs them."""

    config: Config
    world: World
    models: Models
    variants: list[Variant]  # ours first
    arguments: argparse.Namespace
    machine: dict[str, Any]  # what every row says of it

    def held(self, variant: Variant) -> dict[str, Any]:
        """How ours is configured, or, for a baseline, the first of ours."""
        ours = variant if isinstance(variant, Ours) else self.variants[0]
        return {
            "zero_stage": ours.config.zero.stage,
            "quantization": ours.config.model.quantization,
            "attention": ours.module.attention.label(self.world.device.type),
        }

    def draw(
        self, lengths: Lengths, count: int, *, tokens: int = 0, max_tokens: int = 0
    ) -> list[GlobalBatch]:
        """Steps of `tokens` on each side and rank."""
        most = self.config.memory.max_tokens
        share = (self.arguments.tokens or most * self.world.size) // self.world.size
        if share < lengths.longest:
            message = f"--tokens leaves a rank {share}, below data.max_length={lengths.longest}"
            raise AgreedError(ValueError(message))
        vocabularies = (self.models.encoder.vocab_size, self.models.decoder.vocab_size)
        about = {"vocabularies": vocabularies, "parts": self.config.data.parts}
        drawn = Drawn(lengths=lengths, tokens=tokens or share, **about)
        return drawn.global_batches(count, self.world, max_tokens or most)

    def row(
        self,
        variant: Variant,
        global_batches: list[GlobalBatch],
        seconds: list[list[float]],
        check: Check,
    ) -> dict[str, Any]:
        """A variant's figures.

        Args:
            seconds: By step and rank; a step takes as long as its last rank.
        """
        step_s = [max(ranks) for ranks in seconds]
        pairs = [pair_tokens(each.student_tokens, each.teacher_tokens) for each in global_batches]
        documents = [each.totals.documents for each in global_batches]
        pairs_per_s = _rates(pairs, step_s)
        flops_per_pair = 6 * self.models.matmul_parameters
        tflops = flops_per_pair * pairs_per_s["median"] / self.world.size / 1e12  # of one device
        peak = measure.nominal_tflops(self.machine["device"])
        return {
            "variant": variant.name,
            **self.machine,
            **self.held(variant),
            "batch": getattr(variant, "batch", self.config.memory.max_tokens),
            "checkpointing": getattr(variant, "checkpointing", False),
            "compiled": getattr(variant, "compiled", False),
            "steps": len(global_batches),
            "documents": documents[0],
            "pair_tokens": pairs[0],
            "pairs_per_s": pairs_per_s,
            "documents_per_s": _rates(documents, step_s),
            "step_s": measure.spread(step_s),
            "rank_step_s": [measure.extremes(ranks) for ranks in zip(*seconds)],
            "tflops": tflops,
            "mfu": peak and tflops / peak,
            "gemm_share": tflops / self.machine["gemm_tflops"],
            "error": check.worst[variant.name],
        }


def _rates(counts: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    return measure.spread([count / taken_s for count, taken_s in zip(counts, seconds)])


def compare(bench: Bench, text: str) -> Iterator[dict[str, Any]]:
    """A row for each variant at one distribution of lengths, and before them those of a sweep.

    Raises:
        ValueError: Losses or gradient norms differ.
    """
    lengths = parse_lengths(text, bench.config.data.max_length)
    global_batches = bench.draw(lengths, WARM_UP + bench.arguments.steps)
    if bench.arguments.sweep:
        yield from _swept(bench, text)
    for variant in bench.variants:
        _make_fit(variant, global_batches[0], bench.world)
    check = _build_check(bench)
    seconds = measure.rounds(bench.variants, global_batches, bench.world, check)
    for variant in bench.variants:
        row = bench.row(variant, global_batches[WARM_UP:], seconds[variant.name][WARM_UP:], check)
        row |= {"data": "excluded", "lengths": text}
        yield row | _inside(bench, variant, global_batches[-1], row["step_s"]["median"])


def _swept(bench: Bench, text: str) -> Iterator[dict[str, Any]]:
    """Sets each baseline to what is best for it, and says what was tried."""
    lengths = parse_lengths(text, bench.config.data.max_length)
    tried = bench.draw(lengths, 1 + STEPS)
    about = {**bench.machine, **bench.held(bench.variants[0]), "data": "sweep", "lengths": text}
    pairs = [pair_tokens(each.student_tokens, each.teacher_tokens) for each in tried[1:]]
    for variant in bench.variants:
        if isinstance(variant, Baseline):
            for row in sweep(variant, tried, bench.config.memory.max_tokens, bench.world):
                rate = sum(pairs) / len(pairs) / row["step_s"] if "step_s" in row else None
                yield about | row | {"pairs_per_s": rate}


def _build_check(bench: Bench) -> Check:
    ours = [each for each in bench.variants if isinstance(each, Ours)]
    forms = {each.name: each.config.model.quantization for each in ours}
    return Check(bench.config.model.dtype, bench.world, forms)


def _make_fit(variant: Variant, global_batch: GlobalBatch, world: World) -> None:
    """Halves a baseline's micro-batches until a step fits into the GPU's memory."""
    while world.device.type == "cuda":
        try:
            variant.run(global_batch)
            return
        except torch.OutOfMemoryError as error:
            if not isinstance(variant, Baseline) or variant.batch == 1 or world.size > 1:
                message = f"{variant.name} does not fit into memory; lower memory.max_tokens"
                raise ValueError(message) from error
            variant.batch //= 2
        variant.module.zero_grad(set_to_none=False)  # which ranks sum where they lie
        torch.cuda.empty_cache()


def _inside(
    bench: Bench, variant: Variant, global_batch: GlobalBatch, step_s: float
) -> dict[str, Any]:
    """Where a step's time and memory go, in passes of their own. Args: step_s: of one alone."""
    file, world = bench.arguments.profile, bench.world
    if file is not None and variant.name != "ours":
        file = file.with_stem(f"{file.stem}-{variant.name.replace(' ', '-')}")
    seen, events = measure.trace(variant, global_batch, world, file if world.is_main else None)
    parts = measure.split(variant, global_batch, world) | {"collectives": seen.pop("collectives_s")}
    inside = {
        "split_s": parts,
        "padding": variant.padding,  # the share of it among the encoder's tokens
        **seen,
        "peak_bytes": measure.kept_bytes(variant) + seen["step_bytes"],
        "profile": _profile(bench, variant, global_batch, events, step_s),
    }
    if world.size > 1:
        inside["gathered_bytes"] = measure.gathered_bytes(variant, global_batch)
    return inside


def _profile(
    bench: Bench, variant: Variant, global_batch: GlobalBatch, events: Sequence[Any], step_s: float
) -> list[dict[str, Any]]:
    """Bounds are ours alone: of the others' kernels nobody counts what they must do."""
    on_gpu = bench.world.device.type == "cuda"
    measured = profile.by_kind(events, on_gpu=on_gpu, rank=bench.config.lora.rank)
    machine = bench.machine
    rates = profile.Rates(machine["copy_gbytes_per_s"] * 1e9, machine["gemm_tflops"] * 1e12)
    bounds = profile.Bounds(getattr(torch, bench.config.model.dtype), rates)
    if isinstance(variant, Ours):
        with bounds.counting():
            variant.run(global_batch)
    busy_s = sum(entry["s"] for entry in measured.values())
    return profile.rows(measured, bounds.least_s, max(0.0, step_s - busy_s) if on_gpu else None)


def included(bench: Bench) -> list[dict[str, Any]]:
    """The same with the data's own cost: each variant alone, fed by the config's corpora."""
    config, world = bench.config, bench.world
    tokenizer = build_tokenizer(config, bench.models.stack)
    check = _build_check(bench)
    rows = []
    for variant in (variant for variant in bench.variants if variant.name in ("ours", "padded")):
        stream = build_stream(config.data, tokenizer, world, seed=config.run.seed)
        next_batch = functools.partial(agree, stream, world, config.memory.max_tokens)
        global_batches, seconds, waits = [], [], []
        for step in range(WARM_UP + config.data.prefetch + bench.arguments.steps):
            global_batch, wait_s = measure.timed(next_batch, world)
            result, run_s = measure.timed(functools.partial(variant.run, global_batch), world)
            check(variant.name, step, result)
            global_batches.append(global_batch)
            waits.append(wait_s)
            seconds.append(world.gather(wait_s + run_s))
        stream.close()
        # What was read ahead while nothing trained is not counted.
        timed = slice(WARM_UP + config.data.prefetch, None)
        row = bench.row(variant, global_batches[timed], seconds[timed], check)
        row |= {"data": "included", "lengths": "corpus"}
        rows.append(row | {"data_wait_s": measure.spread(waits[timed])})
    return rows


def linear(bench: Bench, text: str) -> list[dict[str, Any]]:
    """Our cost per token at packs of 2k to 32k tokens."""
    lengths = parse_lengths(text, bench.config.data.max_length)
    steps = [
        bench.draw(lengths, WARM_UP + bench.arguments.steps, tokens=size, max_tokens=size)
        for size in SIZES
    ]
    ours, check = bench.variants[0], _build_check(bench)
    global_batches = [each for turn in zip(*steps) for each in turn]  # sizes interleaved
    seconds = measure.rounds([ours], global_batches, bench.world, check)[ours.name]
    rows = []
    for number, size in enumerate(SIZES):
        timed = slice(WARM_UP * len(SIZES) + number, None, len(SIZES))
        row = bench.row(ours, global_batches[timed], seconds[timed], check)
        rows.append(row | {"data": "excluded", "lengths": text, "pack_tokens": size})
    return rows


def run(bench: Bench) -> int:
    """Measures what the command line asks for; rank 0 writes each row when it is there, and prints
    them all."""
    arguments = bench.arguments
    measured = linear if arguments.linear else compare
    parts = [functools.partial(measured, bench, text) for text in arguments.lengths.split(",")]
    if not arguments.linear and _has_data(bench.config):
        parts.append(functools.partial(included, bench))
    rows: list[dict[str, Any]] = []
    out = arguments.out if bench.world.is_main else None
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")
    for row in itertools.chain.from_iterable(part() for part in parts):
        rows.append(row)
        if out is not None:
            with out.open("a") as file:
                print(json.dumps(row), file=file)
    if not bench.world.is_main:
        return 0
    show = tables.show_linear if arguments.linear else tables.show
    return show(rows, arguments.out)


def _has_data(config: Config) -> bool:
    """Corpora, and tokenizers to read them with: the latter beside random weights too, where
    `model.encoder` and `model.decoder` are folders of smaller vocabularies."""
    needed = [*config.data.train, config.model.encoder, config.model.decoder]
    return bool(config.data.train) and all(Path(path).is_dir() for path in needed)


def build_bench(arguments: argparse.Namespace, config: Config, world: World) -> Bench:
    ours, models = _build_ours(config, arguments.random_weights, world)
    variants: list[Variant] = [ours]
    for word in [] if arguments.linear else arguments.beside:
        other = _loaded(arguments, [word])
        variants.append(_build_ours(other, arguments.random_weights, world, f"ours, {word}")[0])
    forms = [each.config.model.quantization for each in variants]
    choice = "" if arguments.linear else arguments.baseline
    baselines = build_baselines(choice, config, models, world)
    dtype = getattr(torch, config.model.dtype)
    machine = environment(world) | {
        "driver": measure.driver(world.device),
        "dtype": config.model.dtype,
        "parts": config.data.parts,
        "tolerance": max(TOLERANCE[config.model.dtype], *(QUANTISED[form] for form in forms)),
        "weights": arguments.random_weights or f"{config.model.decoder}+{config.model.encoder}",
        "gemm_tflops": measure.gemm_tflops(world.device, dtype),
        "copy_gbytes_per_s": measure.copy_gbytes_per_s(world.device),
    }
    if world.size > 1:
        layer_bytes = models.matmul_parameters // models.decoder.num_hidden_layers * dtype.itemsize
        machine["all_gather_gbytes_per_s"] = measure.all_gather_gbytes_per_s(layer_bytes, world)
    parts = {"config": config, "world": world, "models": models, "machine": machine}
    return Bench(**parts, variants=[*variants, *baselines], arguments=arguments)


def _build_ours(
    config: Config, weights: str, world: World, name: str = "ours"
) -> tuple[Ours, Models]:
    """Ours with starts at which every adapter works. Args: weights: As `build_models`' shape."""
    models = world.together(lambda: build_models(config, weights, world))
    engine = build_engine(config, models.stack, world)
    engine.load_trained_state(models.trained, updates=0)
    return Ours(config=config, world=world, engine=engine, module=models.stack, name=name), models


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.step`; DeepSpeed's launcher puts `--local_rank=N` first."""
    words = launched_words(argv)
    arguments = _build_parser().parse_intermixed_args(words)
    world = None
    try:
        if arguments.scaling:
            return tables.show_scaling(arguments.scaling)
        config = _configure(arguments)
        world = connect()
        status = run(build_bench(arguments, config, world))
    except (ValueError, OSError) as error:
        tell(error, "benchmarks.step", world)
        return 1
    world.close()
    return status


def _configure(arguments: argparse.Namespace) -> Config:
    """The user's config, without dropout; ZeRO-3 under a launcher, plain PyTorch without."""
    if arguments.config is None:
        raise ValueError("name a CONFIG, such as configs/nllb600m_llama3_8b.toml")
    if arguments.baseline not in ("", *BASELINES):
        raise ValueError(f"--baseline {arguments.baseline}: write padded, unpadded or all")
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {arguments.steps}")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch sees")
    # Variants take turns in one pool; the profiler tells of each start and stop; PEFT warns.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    deprecated = "`(is_)?gradient_checkpointing"
    warnings.filterwarnings("ignore", category=FutureWarning, message=deprecated)
    config = _loaded(arguments, [])
    for word in arguments.beside:  # refused before anything is built
        _loaded(arguments, [word])
    if arguments.baseline and config.data.parts != "whole":
        raise ValueError(f"--baseline reads texts whole; leave out data.parts={config.data.parts}")
    for text in arguments.lengths.split(","):
        parse_lengths(text, config.data.max_length)
    return config


def _loaded(arguments: argparse.Namespace, others: list[str]) -> Config:
    """Args: others: Overrides that are not of the command line's."""
    ours = [f"zero.stage={3 if 'RANK' in os.environ else 0}", "lora.dropout=0.0"]
    return configs.load(arguments.config, [*arguments.overrides, *ours, *others])


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description="A whole optimizer step beside its baselines."
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="TOML file, as for training")
    add("overrides", nargs="*", metavar="section.key=value")
    names = "padded, unpadded or all (default: ours alone)"
    add("--baseline", default="", metavar="NAME", help=names)
    lengths = "median tokens of a document, or equal; several with commas"
    add("--lengths", default="350", help=lengths)
    best = "first find each baseline's best micro-batches, checkpointing and torch.compile"
    add("--sweep", action="store_true", help=best)
    add("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    steps = "timed steps of each variant (default: 5)"
    add("--steps", type=int, default=5, metavar="N", help=steps)
    add("--tokens", type=int, metavar="N", help="a step's tokens, each side, over all ranks")
    add("--random-weights", default="", metavar="SHAPE", help="such as llama3_8b+nllb600m")
    again = "ours once more, so configured; may be said several times"
    add("--beside", action="append", default=[], metavar="section.key=value", help=again)
    packs = "our cost per token at packs of 2k to 32k tokens"
    add("--linear", action="store_true", help=packs)
    add("--out", type=Path, metavar="FILE", help="a JSON line per variant, and a chart beside it")
    traces = "a trace for Perfetto, one for each variant"
    add("--profile", type=Path, metavar="FILE", help=traces)
    files = "compare --out files of several sizes"
    add("--scaling", type=Path, nargs="+", metavar="FILE", help=files)
    return parser


if __name__ == "__main__":
    sys.exit(main())
