"""Stage-1 self-distillation: `deepspeed --num_gpus N --module mtllm_engine.train CONFIG [section.key=value ...]`."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mtllm_engine import checkpoint, kernels
from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.data.batch import collate
from mtllm_engine.data.stream import Step, agree, build_stream, hash64
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.engine import PlainEngine, ZeroEngine, build_engine, learning_rate, shard
from mtllm_engine.metrics import Metrics, Record, environment, print_table
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.model.mtllm import Stack
from mtllm_engine.model.pretrained import build_stack, build_tokenizer
from mtllm_engine.report import write_report
from mtllm_engine.world import Agreed, World, connect


def train(config: Config, world: World) -> None:
    """Runs or continues a training run in `run.dir`.

    Raises:
        ValueError: Something the user can mend; the message names it and the fix.
    """
    stack, weights = world.together(lambda: build_stack(config))
    tokenizer = world.together(lambda: build_tokenizer(config, stack))
    stream = world.together(lambda: build_stream(config.data, tokenizer, world, seed=config.run.seed))
    engine = build_engine(config, shard(stack, weights, config, world), world)
    start = checkpoint.restore(config, world, engine, stream)
    world.on_main(lambda: _describe(config, world, stack, start))
    with Metrics(config, world, start=start) as metrics, _stop_requests(config) as stop_requested:
        if start == 0:
            validate(config, world, engine, tokenizer, metrics, step=0)
        for step in range(start, config.optim.steps):
            with metrics.step(step) as record:
                work = agree(stream, world, config.memory.max_tokens, stop=stop_requested())
                train_step(config, world, engine, work, step, record)
            is_last = work.stop or step + 1 == config.optim.steps
            if (step + 1) % config.run.validate_every == 0 or step + 1 == config.optim.steps:
                validate(config, world, engine, tokenizer, metrics, step=step + 1)
            if (step + 1) % config.checkpoint.every == 0 or is_last:
                metrics.flush()
                checkpoint.save(config, world, engine, stream, step + 1)
            if is_last:
                break
    stream.close()
    world.on_main(lambda: write_report(Path(config.run.dir)))


def train_step(
    config: Config, world: World, engine: PlainEngine | ZeroEngine, work: Step, step: int, record: Record
) -> None:
    """One optimizer step on the mean over the global batch, whatever rank a document landed on."""
    record.data(work)
    seed = step_seed(config.run.seed, step)
    loss, sums = torch.zeros((), device=world.device), 0
    for documents in work.micro_batches:
        batch = collate(documents, step_seed=seed, device=world.device)
        share = engine(batch, work.spans)
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
    *,
    step: int,
) -> None:
    """Held-out FVU and cosine over every document of `data.validation`, summed in fp64.

    Raises:
        ValueError: The documents seen are not those that the manifest counts.
    """
    if not config.data.validation:
        return
    metrics.flush()
    stream = build_stream(config.data, tokenizer, world, seed=config.run.seed, epochs=1)
    sums, spans, skipped = 0, 0, 0
    with engine.evaluating():
        while (work := agree(stream, world, config.memory.max_tokens)).spans:
            for documents in work.micro_batches:
                batch = collate(documents, step_seed=0, device=world.device)
                sums = sums + engine(batch, work.spans).moments
            spans += work.spans
    skipped = work.skipped
    stream.close()
    expected = stream.mixture.corpora[0].manifest.samples
    if spans + skipped != expected or spans == 0:
        told = f"{config.data.validation}: {spans} documents were read and {skipped} skipped of {expected}"
        raise Agreed(ValueError(told))  # the counts are all ranks', so all raise
    metrics.validation(step, world.sum(sums))


def step_seed(seed: int, step: int) -> int:
    """What dropout hashes besides the document: 32 bits of (run.seed, step)."""
    return int(hash64(torch.tensor([step]).numpy(), seed)[0]) & 0xFFFFFFFF


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `deepspeed --module mtllm_engine.train`; DeepSpeed's launcher puts `--local_rank=N` first."""
    arguments = [item for item in (sys.argv[1:] if argv is None else argv) if not item.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print("usage: deepspeed --num_gpus N --module mtllm_engine.train CONFIG [section.key=value ...]")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    world = None
    try:
        config = configs.load(arguments[0], arguments[1:])
        world = connect()
        train(config, world)
    except (ValueError, OSError) as error:
        is_common = world is None or isinstance(error, Agreed)
        if not is_common or os.environ.get("RANK", "0") == "0":
            print("mtllm: error:", " ".join(str(error).split()), file=sys.stderr)
        if isinstance(error, Agreed):
            world.close()  # the others leave too; after an error of one rank alone they would be waited for in vain
        return 1
    world.close()
    return 0


def _describe(config: Config, world: World, stack: Stack, start: int) -> None:
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
            "encoder": f"{config.model.encoder} (frozen)",
            "decoder": f"{config.model.decoder} ({'causal' if config.model.causal else 'bidirectional'})",
            "parameters": weights,
            "device": f"{world.size} x {environment(world)['device']}, ZeRO stage {config.zero.stage}",
            "step": f"{data.lanes} packs of {pack}, micro-batches of up to {config.memory.max_tokens} tokens",
            "corpora": ", ".join(data.train),
            "kernels": "; ".join(f"{label}: {', '.join(names)}" for label, names in ops.items()),
        }
    )


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
