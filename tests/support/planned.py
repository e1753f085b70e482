"""What ZeRO-3 really holds and sends on a rank, to be set beside what the plan says."""

import math
from collections import Counter
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mtllm_engine.config import Config
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.model.build import build_stack, build_tokenizer, read_models
from mtllm_engine.training.engine import MOMENTS, ZeroEngine, shard
from mtllm_engine.training.memory import Models
from mtllm_engine.training.step import train_step
from mtllm_engine.world import World
from tests.support.tiny import build_config

BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "unsigned char": 1}
RELEASED = {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0}
RELEASED |= {"stage3_param_persistence_threshold": 100}
SOME = {"stage3_max_live_parameters": 60_000, "stage3_max_reuse_distance": 15_000}
CASES = {
    "kept": ({}, "cheap", "none"),
    "some": (SOME, "mlp", "none"),
    "released": (RELEASED, "layer", "none"),
    "nf4": (RELEASED, "cheap", "nf4"),
}
"""DeepSpeed's limits, by which weights are kept for their backward or not, memory.recompute and
model.quantization."""


def case_config(folder: Path, case: str) -> Config:
    limits, recompute, form = CASES[case]
    return build_config(
        folder,
        model={"quantization": form},
        memory={"max_tokens": 160, "recompute": recompute},
        zero={"stage": 3},
        deepspeed={"zero_optimization": limits} if limits else {},
    )


def models_of(config: Config) -> Models:
    """What the plan is made of."""
    encoder, decoder = read_models(config.model)
    return Models(encoder=encoder, decoder=decoder, stack=build_stack(config)[0])


def measured(config: Config, world: World) -> dict[str, int]:
    """Bytes of the second step: in the first ZeRO-3 learns the order of the modules."""
    stack, weights = build_stack(config)
    stream = build_stream(config.data, build_tokenizer(config, stack), world, seed=0)
    engine = ZeroEngine(config, shard(stack, weights, config, world), world)
    train_step(config, world, engine, agree(stream, world, config.memory.max_tokens), 0)
    batch = agree(stream, world, config.memory.max_tokens)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        train_step(config, world, engine, batch, 1)
    stream.close()
    return {"micro_batches": len(batch.micro_batches), **sent(profiled), **held(engine)}


def sent(profiled: profile) -> dict[str, int]:
    """Bytes that came to this rank."""
    counts: Counter[str] = Counter()
    for event in profiled.profiler.kineto_results.events():
        name = event.name()
        if name.startswith(("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")):
            (first, second), width = map(math.prod, event.shapes()[:2]), BYTES[event.dtypes()[0]]
            kind = "gathered" if "gather" in name else "reduced"
            counts[kind] += abs(first - second) * width
    return counts


def held(engine: ZeroEngine) -> dict[str, int]:
    """Bytes of weights, and of what is trained with its states."""
    counts: Counter[str] = Counter()
    for parameter in engine.stack.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        counts[kind] += parameter.ds_tensor.nbytes
        counts["whole"] += parameter.ds_persist * parameter.ds_numel * parameter.element_size()
    zero = engine.zero
    counts["trained"] += sum(flat.nbytes for flat in zero.fp32_partitioned_groups_flat)
    counts["trained"] += zero.grad_partitions_flat_buffer.nbytes
    for state in engine.optimizer.state.values():
        counts["trained"] += sum(state[key].nbytes for key in MOMENTS)
    return counts
