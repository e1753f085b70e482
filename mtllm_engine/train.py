"""Self-distillation: `deepspeed --num_gpus N --module mtllm_engine.train CONFIG [section.key=value
...]`, stage 1 and stage 2; and the loop that `mtllm_engine.finetune` shares.

What only distils imports no task, source of texts, report or probe: they are imported where a
configuration asks for them.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mtllm_engine import config as configs
from mtllm_engine.config import Config, flatten
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import Stream, agree, build_stream
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.build import build_stack, build_tokenizer, settle
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.weights import Weights
from mtllm_engine.progress import warn
from mtllm_engine.training import checkpoint, step
from mtllm_engine.training.closed_form import Fit, fit_projection
from mtllm_engine.training.engine import (
    PlainEngine,
    ZeroEngine,
    build_engine,
    check_deepspeed,
    shard,
)
from mtllm_engine.training.launch import run_command, stop_requests, wait_if_abandoned
from mtllm_engine.training.layout import settle as settle_layout
from mtllm_engine.training.lock import sole_owner
from mtllm_engine.training.log import RunLog, write_header
from mtllm_engine.training.origins import check_origins
from mtllm_engine.world import World

if TYPE_CHECKING:
    from mtllm_engine.tasks import Task

MeasureProbe = Callable[[PlainEngine | ZeroEngine], tuple[dict, str]]
"""The probe's row and words of a moment."""
PLACES = ("run.dir", "data.train", "validation.corpus", "task.test", "evaluate.")
PLACES += ("model.encoder", "model.decoder", "model.adapters")
PLACES += ("model.init_from", "model.teacher")
"""Keys that say where something lies, whose content a checkpoint knows, or that training does not
read."""


def train(config: Config, world: World) -> None:
    """`learn`, from a teacher.

    Raises:
        ValueError: As `learn`; the configuration is of fine-tuning.
    """
    if config.objective.kind != "distil":
        raise ValueError('objective.kind = "finetune": that is `mtllm finetune`, this distils')
    learn(config, world)


def learn(config: Config, world: World) -> None:
    """Runs or continues a training run in `run.dir`, whatever learns; says so where all is done.

    Raises:
        ValueError: Something the user can mend; the message names it and the fix.
    """
    with sole_owner(Path(config.run.dir), world):
        config = world.on_main(lambda: prepare(config))
        done = world.on_main(lambda: checkpoint.steps_done(config))
        if done < config.optim.steps:
            _run(*settle_layout(config, world), world)
        else:
            world.on_main(lambda: _tell_done(config, done))


class Assembled(NamedTuple):
    """What a run trains with, its models filled."""

    stack: Stack
    tokenizer: PairTokenizer
    stream: Stream
    measure_probe: MeasureProbe | None
    fit: Fit | None
    flops: tuple[int, int]
    """Of a student's and of a teacher's token."""
    engine: PlainEngine | ZeroEngine


def assemble(config: Config, world: World) -> Assembled:
    """Reads the models and opens the corpora; nothing of an earlier run is loaded.

    Args:
        config: As `prepare` returns it, its layout settled.

    Raises:
        ValueError: As `learn`.
    """
    world.on_main(lambda: check_origins(config))
    task = find_task(config)
    head = task.head_size if task else None
    stack, weights = world.together(lambda: build_stack(config, head=head))
    flops = stack.flops(bool(config.data.teacher_states))  # of whole weights, so before `shard`
    tokenizer = world.together(lambda: build_tokenizer(config, stack))
    stream = world.together(lambda: open_stream(config, tokenizer, world))
    measure_probe = world.together(lambda: _open_probe(config, world, tokenizer))
    fit = start_projection(config, world, stack, weights, tokenizer)
    engine = build_engine(config, shard(stack, weights, config, world), world)
    return Assembled(stack, tokenizer, stream, measure_probe, fit, flops, engine)


def _run(config: Config, layout: str, world: World) -> None:
    """Trains to the last step, or until it is asked to stop. Args: layout: In words."""
    run_dir = Path(config.run.dir)
    stack, tokenizer, stream, measure_probe, fit, flops, engine = assemble(config, world)
    progress = checkpoint.restore(config, world, engine, stream)
    start = progress.step
    world.on_main(lambda: write_header(config, world, stack, tokenizer, start, fit, layout))
    with (
        RunLog(config, world, stack.objective.measures, flops, progress=progress) as log,
        stop_requests(run_dir) as stop_requested,
    ):

        def validate(done: int) -> float | None:
            """The score after `done` steps, higher being better; None without documents. The probe
            is measured too, and scores nothing."""
            log.flush()
            if measure_probe:
                log.measured(done, *measure_probe(engine))
            if not config.validation.corpus:
                return None
            held_out = open_stream(config, tokenizer, world, corpus=config.validation.corpus)
            moments, documents = step.validate(config, world, engine, held_out)
            values = stack.objective.measures(moments)
            row = {f"validation_{name}": value for name, value in values.items()}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            log.measured(done, row | {"validation_documents": documents}, f"held-out {shown}")
            return values.get("accuracy", -values.get("fvu", 0.0))

        if start == 0:
            validate(0)
        for done in range(start + 1, config.optim.steps + 1):
            with log.step(done) as record:
                batch = agree(stream, world, config.memory.max_tokens, stop=stop_requested())
                record.data(batch)
                record.result(step.train_step(config, world, engine, batch, done - 1))
            is_last = batch.stop or done == config.optim.steps
            score = None
            if done % config.validation.every == 0 or done == config.optim.steps:
                score = validate(done)
            is_due = done % config.checkpoint.every == 0 or is_last
            if is_due or checkpoint.is_best(config, world, score):
                log.flush()
                world.on_main(wait_if_abandoned)
                checkpoint.save(config, world, engine, stream, done, score, log.bad_steps)
            if is_last:
                break
    stream.close()
    world.on_main(lambda: _write_report(run_dir))
    world.on_main(lambda: print(_ending(config, done), flush=True))


def prepare(config: Config) -> Config:
    """The configuration with nothing left open: a task's files packed into the run's folder, epochs
    counted in steps, a sum's adapters as they are.

    Raises:
        ValueError: A file of the task is missing or malformed; `[deepspeed]` has a key that does
            nothing or breaks the run; a sum has no adapters, or others than [lora] asks for.
    """
    check_deepspeed(config.deepspeed)
    data, optim = config.data, config.optim
    if config.task.train:
        corpora = _pack_task(config)
        data = replace(data, train=(corpora["train"], *data.train))
        held_out = corpora.get("validation", config.validation.corpus)
        task = replace(config.task, train="", validation="")
        validation = replace(config.validation, corpus=held_out)
        config = replace(config, data=data, task=task, validation=validation)
    if not data.train:
        raise ValueError("data.train names no corpus, and task.train no files")
    if optim.epochs:
        samples = sum(Manifest.load(path).samples for path in data.train)
        steps = math.ceil(optim.epochs * samples / (data.lanes * data.pack_documents))
        optim = replace(optim, steps=steps, epochs=0.0)
    if not optim.steps:
        raise ValueError("optim.epochs or optim.steps must be above 0")
    return settle(replace(config, optim=optim))


def check_files(config: Config) -> None:
    """Looks for what training will read, and makes nothing.

    Raises:
        ValueError: The task, one of its files or a corpus is missing or unfit.
    """
    if task := find_task(config):
        from mtllm_engine.tasks import find_dataset

        for split in ("train", "validation"):
            if source := getattr(config.task, split):
                dataset, folder = find_dataset(task, source)
                dataset.read(folder, split, ENGLISH)
    held_out = not config.task.validation and config.validation.corpus
    for corpus in filter(None, (*config.data.train, held_out)):
        Manifest.load(corpus)


def find_task(config: Config) -> "Task | None":
    """The configuration's task, if it has one.

    Raises:
        ValueError: The task is unknown, or none that can be distilled, where that is asked for.
    """
    if not config.task.name:
        return None
    from mtllm_engine.tasks import load_task

    task = load_task(config.task.name)
    if task.head == "span" and config.objective.kind == "distil":
        reason = "asks for a piece of the text, which no pooled state holds"
        fix = 'learn it directly, by `mtllm finetune` with objective.reader="stack"'
        raise ValueError(f"task {task.name} {reason}: {fix}")
    return task


def open_stream(
    config: Config, tokenizer: PairTokenizer, world: World, *, corpus: str | None = None
) -> Stream:
    """`build_stream` as the configuration's objective needs it."""
    learns_labels = config.objective.kind == "finetune" and find_task(config).head != "span"
    maker = None
    if config.data.teacher_states:
        maker = world.on_main(lambda: checkpoint.teacher_identity(config))
    return build_stream(
        config.data,
        tokenizer,
        world,
        seed=config.run.seed,
        corpus=corpus,
        aligns=config.objective.token_weight > 0,
        labelled=learns_labels,
        maker=maker,
    )


def start_projection(
    config: Config, world: World, stack: Stack, weights: Weights, tokenizer: PairTokenizer
) -> Fit | None:
    """Solves for the projection that a new run starts from, if it is to be solved for.

    Raises:
        ValueError: As `fit_projection`.
    """
    name = "projection.weight"
    is_new = name in weights.shapes and name not in weights.sources
    if config.model.projection_init != "least_squares" or not is_new:
        return None
    if world.on_main(lambda: checkpoint.latest(Path(config.run.dir) / "checkpoints")):
        return None
    fit = fit_projection(config, world, stack, weights, tokenizer)
    weights.starts |= fit.values
    return fit


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `deepspeed --module mtllm_engine.train`."""
    return run_command(train, "train", argv)


def _pack_task(config: Config) -> dict[str, str]:
    """The corpora that a task's English files are packed into, by split."""
    from mtllm_engine.tasks import load_task, pack_split

    task, folder, corpora = load_task(config.task.name), Path(config.run.dir) / "corpus", {}
    for split in ("train", "validation"):
        if source := getattr(config.task, split):
            corpora[split] = str(pack_split(task, source, split, ENGLISH, folder / split))
    return corpora


def _open_probe(config: Config, world: World, tokenizer: PairTokenizer) -> MeasureProbe | None:
    """What measures the probe that a configuration asks for, if it does: a row, and words."""
    if not config.probe.folder:
        return None
    from mtllm_engine.training.probe import open_probe

    probe = open_probe(config, world, tokenizer)
    return lambda engine: probe.summary(probe(engine))


def _tell_done(config: Config, done: int) -> None:
    """Says that nothing is left to do, and which settings are other than those that did it:
    config.toml keeps the latter."""
    folder = Path(config.run.dir)
    (folder / "STOP").unlink(missing_ok=True)
    print(f"nothing to do: {done} of {config.optim.steps} steps are done in {folder}", flush=True)
    try:
        changed = changes(configs.load(folder / "config.toml"), config)
    except ValueError as error:  # none, or an earlier version's
        changed = []
        print(f"whether the settings are the same cannot be said: {error}", flush=True)
    if changed:
        fix = "it did not apply: set run.dir to train with it"
        warn(f"changed since: {'; '.join(changed)}; {fix}")
    if not (folder / "report.html").is_file():  # killed before it was written
        _write_report(folder)


def changes(before: Config, now: Config) -> list[str]:
    """What is set otherwise now, but for where things lie, and for what "auto" came to on some
    machine."""
    old, new = flatten(before), flatten(now)
    others = (*PLACES, "zero.") if now.zero.stage == "auto" else PLACES
    keys = [key for key in old | new if not key.startswith(others)]
    pairs = {key: (old.get(key), new.get(key)) for key in keys}
    return [f"{key} was {a!r} and is {b!r}" for key, (a, b) in pairs.items() if a != b]


def _ending(config: Config, done: int) -> str:
    """The last line of a run. Args: done: Its last step."""
    folder, steps = config.run.dir, config.optim.steps
    if done < steps:
        return f"stopped after step {done} of {steps}; the same command goes on"
    return f"done, {steps} steps: {folder}/report.html, and `mtllm show {folder}` says what it is"


def _write_report(folder: Path) -> None:
    from mtllm_engine.training.report import write_report

    write_report(folder)


if __name__ == "__main__":
    sys.exit(main())
