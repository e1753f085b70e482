"""Training, whatever learns: `deepspeed --num_gpus N --module mtllm_engine.train CONFIG [section.key=value ...]`.

Self-distillation of stage 1 and stage 2, and the English task before stage 2, are one loop: `objective` in the config
says what learns what.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mtllm_engine import checkpoint, kernels
from mtllm_engine import config as configs
from mtllm_engine.closed_form import Fit, fit_projection
from mtllm_engine.config import Config
from mtllm_engine.data.batch import collate
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import Step, Stream, agree, build_stream, hash64
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.engine import PlainEngine, ZeroEngine, build_engine, learning_rate, shard
from mtllm_engine.metrics import Metrics, Record, environment, print_table
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.model.mtllm import Stack
from mtllm_engine.model.pretrained import Weights, build_stack, build_tokenizer, find_task
from mtllm_engine.probe import Probe, open_probe
from mtllm_engine.report import write_report
from mtllm_engine.tasks import ENGLISH, Task, find_dataset, load_task, pack_split
from mtllm_engine.world import Agreed, World, connect


def train(config: Config, world: World) -> None:
    """Runs or continues a training run in `run.dir`.

    Raises:
        ValueError: Something the user can mend; the message names it and the fix.
    """
    config = world.on_main(lambda: prepare(config))
    stack, weights = world.together(lambda: build_stack(config))
    flops = stack.flops(bool(config.data.targets))
    tokenizer = world.together(lambda: build_tokenizer(config, stack))
    stream = world.together(lambda: open_stream(config, tokenizer, world))
    probe = world.together(lambda: open_probe(config, world, tokenizer))
    fit = start_projection(config, world, stack, weights, tokenizer)
    engine = build_engine(config, shard(stack, weights, config, world), world)
    start = checkpoint.restore(config, world, engine, stream)
    top = world.on_main(lambda: checkpoint.best_score(Path(config.run.dir) / "checkpoints"))
    world.on_main(lambda: _describe(config, world, stack, start, fit))
    with (
        Metrics(config, world, stack.objective.measures, flops, start=start) as metrics,
        _stop_requests(config) as stop_requested,
    ):
        if start == 0:
            validate(config, world, engine, tokenizer, metrics, probe, step=0)
        for step in range(start, config.optim.steps):
            with metrics.step(step) as record:
                work = agree(stream, world, config.memory.max_tokens, stop=stop_requested())
                train_step(config, world, engine, work, step, record)
            is_last = work.stop or step + 1 == config.optim.steps
            score, is_best = None, False
            if (step + 1) % config.run.validate_every == 0 or step + 1 == config.optim.steps:
                score = validate(config, world, engine, tokenizer, metrics, probe, step=step + 1)
                is_best = score is not None and score > top
            if (step + 1) % config.checkpoint.every == 0 or is_last or is_best:
                top = score if is_best else top
                metrics.flush()
                checkpoint.save(config, world, engine, stream, step + 1, score)
            if is_last:
                break
    stream.close()
    world.on_main(lambda: write_report(Path(config.run.dir)))


def prepare(config: Config) -> Config:
    """The configuration with nothing left open: a task's files packed into the run's folder, epochs counted in steps.

    Raises:
        ValueError: A file of the task is missing or malformed.
    """
    if config.task.train:
        task, corpus = load_task(config.task.name), Path(config.run.dir) / "corpus"
        texts = str(_pack(task, config.task.train, "train", corpus))
        data = replace(config.data, train=(texts, *config.data.train))
        if config.task.validation:
            data = replace(data, validation=str(_pack(task, config.task.validation, "validation", corpus)))
        config = replace(config, data=data, task=replace(config.task, train="", validation=""))
    if not config.data.train:
        raise ValueError("data.train names no corpus, and task.train no files")
    if config.optim.epochs:
        samples = sum(Manifest.load(path).samples for path in config.data.train)
        steps = math.ceil(config.optim.epochs * samples / (config.data.lanes * config.data.pack_documents))
        config = replace(config, optim=replace(config.optim, steps=steps, epochs=0.0))
    if not config.optim.steps:
        raise ValueError("optim.epochs or optim.steps must be above 0")
    return config


def check_files(config: Config) -> None:
    """Looks for what training will read, and makes nothing.

    Raises:
        ValueError: The task, one of its files or a corpus is missing or unfit.
    """
    task = find_task(config) if config.task.name else None
    for split, source in (("train", config.task.train), ("validation", config.task.validation)):
        if source:
            dataset, folder = find_dataset(task, source)
            dataset.read(folder, split, ENGLISH)
    for corpus in filter(None, (*config.data.train, not config.task.validation and config.data.validation)):
        Manifest.load(corpus)


def _pack(task: Task, source: str, split: str, corpus: Path) -> Path:
    return pack_split(task, source, split, ENGLISH, corpus / split)


def open_stream(config: Config, tokenizer: PairTokenizer, world: World, *, epochs: int | None = None) -> Stream:
    """`build_stream` as the configuration's objective needs it."""
    learns_labels = config.objective.kind == "finetune" and load_task(config.task.name).head != "span"
    return build_stream(
        config.data,
        tokenizer,
        world,
        seed=config.run.seed,
        epochs=epochs,
        aligns=config.objective.token_weight > 0,
        labelled=learns_labels,
        maker=world.on_main(lambda: checkpoint.teacher_identity(config)) if config.data.targets else None,
    )


def start_projection(
    config: Config, world: World, stack: Stack, weights: Weights, tokenizer: PairTokenizer
) -> Fit | None:
    """Solves for the projection that a new run starts from, if it is to be solved for.

    Raises:
        ValueError: As `fit_projection`.
    """
    is_new = "projection.weight" in weights.shapes and "projection.weight" not in weights.sources
    if config.model.projection_init != "least_squares" or not is_new:
        return None
    if world.on_main(lambda: checkpoint.latest(Path(config.run.dir) / "checkpoints")):
        return None
    fit = fit_projection(config, world, stack, weights, tokenizer)
    weights.starts |= fit.values
    return fit


def train_step(
    config: Config, world: World, engine: PlainEngine | ZeroEngine, work: Step, step: int, record: Record
) -> None:
    """One optimizer step on the mean over the global batch, whatever rank a document landed on."""
    record.data(work)
    seed = step_seed(config.run.seed, step)
    loss, sums = torch.zeros((), device=world.device), 0
    for documents in work.micro_batches:
        batch = collate(documents, step_seed=seed, device=world.device, idle=work.idle)
        share = engine(batch, work.totals)
        engine.backward(share.loss)
        loss, sums = loss + share.loss.detach(), sums + share.moments
    lr = learning_rate(config.optim, step)
    record.result(loss, engine.step(lr), sums, lr)


def validate(
    config: Config,
    world: World,
    engine: PlainEngine | ZeroEngine,
    tokenizer: PairTokenizer,
    metrics: Metrics,
    probe: Probe | None,
    *,
    step: int,
) -> float | None:
    """The measures over every document of `data.validation`, summed in fp64; returns the score, higher being better.
    The probe is measured too, and scores nothing.

    Raises:
        ValueError: The documents seen are not those that the manifest counts.
    """
    metrics.flush()
    if probe:
        metrics.probe(step, probe(engine), probe.num_lines)
    if not config.data.validation:
        return None
    stream = open_stream(config, tokenizer, world, epochs=1)
    sums, documents_read = 0, 0
    with engine.evaluating():
        while (work := agree(stream, world, config.memory.max_tokens)).totals.documents:
            for documents in work.micro_batches:
                batch = collate(documents, step_seed=0, device=world.device, idle=work.idle)
                sums = sums + engine(batch, work.totals).moments
            documents_read += work.totals.documents
    stream.close()
    expected = stream.mixture.corpora[0].manifest.samples
    if documents_read + work.skipped != expected or documents_read == 0:
        told = (
            f"{config.data.validation}: {documents_read} documents were read and {work.skipped} skipped of {expected}"
        )
        raise Agreed(ValueError(told))  # the counts are all ranks', so all raise
    return metrics.validation(step, world.sum(sums), documents_read)


def step_seed(seed: int, step: int) -> int:
    """What dropout hashes besides the document: 32 bits of (run.seed, step)."""
    return int(hash64(torch.tensor([step]).numpy(), seed)[0]) & 0xFFFFFFFF


def run_command(function: Callable[[Config, World], None], module: str, argv: Sequence[str] | None = None) -> int:
    """Entry of `deepspeed --module mtllm_engine.MODULE`; DeepSpeed's launcher puts `--local_rank=N` first."""
    arguments = [item for item in (sys.argv[1:] if argv is None else argv) if not item.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: deepspeed --num_gpus N --module mtllm_engine.{module} CONFIG [section.key=value ...]")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    world = None
    try:
        config = configs.load(arguments[0], arguments[1:])
        world = connect()
        function(config, world)
    except (ValueError, OSError) as error:
        is_common = world is None or isinstance(error, Agreed)
        if not is_common or os.environ.get("RANK", "0") == "0":
            print("mtllm: error:", " ".join(str(error).split()), file=sys.stderr)
        if isinstance(error, Agreed):
            world.close()  # the others leave too; after an error of one rank alone they would be waited for in vain
        return 1
    world.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `deepspeed --module mtllm_engine.train`."""
    return run_command(train, "train", argv)


def _describe(config: Config, world: World, stack: Stack, start: int, fit: Fit | None) -> None:
    """Writes config.toml and environment.json, and prints the run header."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(configs.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment(world), indent=1))
    sizes = {True: 0, False: 0}
    for parameter in stack.parameters():
        sizes[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    quantised = quantised_weights(stack)
    weights = f"{sizes[True]:,} trained in fp32, {sizes[False]:,} frozen in {config.model.dtype}"
    if quantised:
        weights += f", {sum(each.shape.numel() for each in quantised):,} in {config.model.base}"
    data = config.data
    pack = f"{data.pack_documents} documents" if data.pack_documents else f"up to {data.pack_tokens} tokens"
    ops: dict[str, list[str]] = {}
    for name, kernel in (kernels.discover() | {"attention": stack.attention}).items():
        ops.setdefault(kernel.label(world.device.type), []).append(name)
    print_table(
        {
            "run": f"{folder}" + (f" (continued after step {start})" if start else ""),
            "learns": _learns(config),
            "encoder": f"{config.model.encoder} (frozen)" if stack.reads_stack else "none",
            "decoder": f"{config.model.decoder} ({'causal' if config.model.causal else 'bidirectional'})",
            **({"projection": str(fit)} if fit else {}),
            "parameters": weights,
            "device": f"{world.size} x {environment(world)['device']}, ZeRO stage {config.zero.stage}",
            "step": f"{data.lanes} packs of {pack}, micro-batches of up to {config.memory.max_tokens} tokens",
            "corpora": ", ".join(data.train),
            "kernels": "; ".join(f"{label}: {', '.join(names)}" for label, names in ops.items()),
        }
    )


def _learns(config: Config) -> str:
    """What the run does, in words."""
    learner = "the stack" if config.objective.reader == "stack" else "the LLM"
    if config.objective.kind == "finetune":
        return f"{learner}, {config.task.name} in English"
    teacher = f"the LLM of {config.model.teacher}" if config.model.teacher else "the bare LLM"
    source = f", its states stored as {config.data.targets}" if config.data.targets else ""
    return f"{learner} from {teacher}{source}"


@contextlib.contextmanager
def _stop_requests(config: Config) -> Iterator:
    """Says whether to stop after this step: a signal was caught, or a file STOP lies in the run's folder.

    Handlers only set a flag: launchers signal ranks at different times, so the ranks agree at a step's start.
    """
    caught = []
    stop_file = Path(config.run.dir) / "STOP"
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda *_: caught.append(time.time())) for number in signals}
    try:
        yield lambda: bool(caught) or stop_file.exists()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop_file.exists() and os.environ.get("RANK", "0") == "0":
            stop_file.unlink()


if __name__ == "__main__":
    sys.exit(main())
