"""A training step, and a validation: what a run does with a batch."""

from typing import NamedTuple

import torch

from mtllm_engine.config import Config, OptimConfig
from mtllm_engine.data.stream import GlobalBatch, Stream, each_step, hash64
from mtllm_engine.training.engine import PlainEngine, ZeroEngine
from mtllm_engine.world import AgreedError, World


class StepResult(NamedTuple):
    """What a step did, on this rank's device."""

    loss: torch.Tensor  # fp32: this rank's share of the global mean
    grad_norm: torch.Tensor  # before clipping; the same on every rank
    moments: torch.Tensor  # fp64: this rank's share of the objective's
    lr: float


def train_step(
    config: Config,
    world: World,
    engine: PlainEngine | ZeroEngine,
    global_batch: GlobalBatch,
    step: int,
) -> StepResult:
    """One optimizer step on the mean over the global batch, whatever rank a document landed on."""
    seed, lr = step_seed(config.run.seed, step), learning_rate(config.optim, step)
    loss, moments = torch.zeros((), device=world.device), 0
    for _, batch in global_batch.batches(world.device, seed):
        share = engine(batch, global_batch.totals)
        engine.backward(share.loss)
        loss, moments = loss + share.loss.detach(), moments + share.moments
    return StepResult(loss, engine.step(lr), moments, lr)


def validate(
    config: Config, world: World, engine: PlainEngine | ZeroEngine, stream: Stream
) -> tuple[torch.Tensor, int]:
    """The objective's moments over every document of a finite stream, summed over ranks, and the
    number of documents.

    Raises:
        ValueError: The documents seen are not those that the manifest counts.
    """
    moments, num_read = 0, 0
    with engine.evaluating():
        for global_batch in each_step(stream, world, config.memory.max_tokens):
            for _, batch in global_batch.batches(world.device):
                moments = moments + engine(batch, global_batch.totals).moments
            num_read += global_batch.totals.documents
    num_skipped = sum(count for (count,) in world.gather_ints([stream.skipped]))
    corpus = stream.mixture.corpora[0]
    if num_read + num_skipped != corpus.manifest.samples or num_read == 0:
        counts = f"{num_read} documents were read and {num_skipped} skipped"
        # The counts are all ranks', so all raise.
        raise AgreedError(ValueError(f"{corpus.path}: {counts} of {corpus.manifest.samples}"))
    return world.sum(moments), num_read


def step_seed(seed: int, step: int) -> int:
    """What dropout hashes besides the document: 32 bits of (run.seed, step)."""
    return int(hash64(torch.tensor([step]).numpy(), seed)[0]) & 0xFFFFFFFF


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up to `optim.lr` over the first `optim.warmup_ratio * optim.steps` steps, then
    linear decay to 0."""
    warmup_steps = round(optim.warmup_ratio * optim.steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    return optim.lr * (optim.steps - step) / (optim.steps - warmup_steps)
