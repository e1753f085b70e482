"""Runs scenarios on this rank of a ZeRO-3 world, results as JSON: `python -m
tests.support.zero_worker FOLDER SCENARIO ...`."""

import contextlib
import gc
import hashlib
import itertools
import json
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import mtllm_engine.kernels
from mtllm_engine import train as training
from mtllm_engine.config import FOLLOWING, Config
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.evaluate import evaluate
from mtllm_engine.model import activations
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.tensors import TensorFiles
from mtllm_engine.targets import write_targets
from mtllm_engine.training.engine import ZeroEngine, import_deepspeed, shard
from mtllm_engine.training.step import train_step
from mtllm_engine.world import World, connect
from tests.support.machine import HANG_S
from tests.support.planned import CASES, case_config, measured
from tests.support.stages import (
    checkpoint,
    evaluation_config,
    finetuning_config,
    recorded_scores,
    rows,
    stage2_config,
)
from tests.support.tiny import build_config

ADAPTERS = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.05}}
UNDROPPED = {"lora": {"dropout": 0.0}}


@contextlib.contextmanager
def recorded_keys(stop_at: int = 0, stop_file: Path | None = None):
    """The document keys of every step this rank runs; asks for a stop in step `stop_at`."""
    steps: list[list[str]] = []

    def recording(stream, world, max_tokens, *, stop=False):
        global_batch = agree(stream, world, max_tokens, stop=stop)
        if stream.mixture.epochs is None:
            documents = itertools.chain.from_iterable(global_batch.micro_batches)
            steps.append([document.key for document in documents])
            if len(steps) == stop_at - 1 and world.is_main:
                stop_file.touch()
        return global_batch

    training.agree = recording
    try:
        yield steps
    finally:
        training.agree = agree


def run(config: Config, world: World, stop_at: int = 0) -> list[list[str]]:
    """A training run, whatever learns; returns this rank's document keys by step."""
    folder = Path(config.run.dir)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    with recorded_keys(stop_at, folder / "STOP") as steps:
        training.learn(config, world)
    return steps


def code(folder: Path, world: World) -> dict:
    return {"engine": training.__file__, "kernels": mtllm_engine.kernels.__path__}


def ten_steps(folder: Path, world: World) -> dict:
    options = {"run": {"dir": str(folder / f"ten_steps_{world.size}")}}
    return {"keys": run(build_config(folder, **options, **ADAPTERS), world)}


def whole(folder: Path, world: World) -> dict:
    """Ten steps with the weights whole on each rank: what is summed over the ranks in each, and
    what these hold in the end.
    """
    options = {"run": {"dir": str(folder / f"whole_{world.size}")}, "zero": {"stage": 0}}
    with recorded_sums() as sums:
        keys = run(build_config(folder, **options, **ADAPTERS), world)
    return {"keys": keys, "sums": sums}


@contextlib.contextmanager
def recorded_sums():
    """(numbers, bytes of one, floating point) of all that ranks add up."""
    sums, reduce = [], torch.distributed.all_reduce

    def recording(tensor: torch.Tensor, *rest, **options):
        sums.append((tensor.numel(), tensor.element_size(), tensor.is_floating_point()))
        return reduce(tensor, *rest, **options)

    torch.distributed.all_reduce = recording
    try:
        yield sums
    finally:
        torch.distributed.all_reduce = reduce


def relay(folder: Path, world: World) -> dict:
    """A run that worlds of 1 to 4 ranks hand on, in turns sharded and whole."""
    stage, steps = ((3, 2), (0, 3), (3, 3), (0, 0))[world.size - 1]
    options = {"run": {"dir": str(folder / "relay")}, "zero": {"stage": stage}}
    return {"keys": run(build_config(folder, **options, **ADAPTERS), world, stop_at=steps)}


def broken_rank(folder: Path, world: World) -> dict:
    """The last rank's device computed another number: nobody saves."""
    options = {"run": {"dir": str(folder / "broken")}, "zero": {"stage": 0}}
    config = build_config(folder, optim={"steps": 1}, **options)
    save = training.checkpoint.save

    def spoilt(config, world, engine, *rest):
        if world.rank == world.size - 1:
            with torch.no_grad():
                engine.stack.projection.weight[0, 0].mul_(1 + 2**-23)
        return save(config, world, engine, *rest)

    return error_of(config, world, spoilt)


def error_of(config: Config, world: World, save: Callable) -> dict:
    """What a run ends with that saves its checkpoints so."""
    original, training.checkpoint.save = training.checkpoint.save, save
    try:
        run(config, world)
        return {"error": ""}
    except ValueError as raised:
        return {"error": str(raised)}
    finally:
        training.checkpoint.save = original


def recompute(folder: Path, world: World) -> dict:
    """Activation checkpointing: the recomputed student sees the same dropout."""
    options = {"run": {"dir": str(folder / "recompute")}, "memory": {"recompute": "layer"}}
    return {"keys": run(build_config(folder, **options, **ADAPTERS), world)}


def bf16(folder: Path, world: World) -> dict:
    return {"keys": run(bf16_config(folder, f"bf16_{world.size}", stage=3), world)}


def bf16_config(folder: Path, name: str, *, stage: int) -> Config:
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}}
    return build_config(folder, model={"dtype": "bfloat16"}, **options, **ADAPTERS)


def fp8(folder: Path, world: World) -> dict:
    return {"keys": run(fp8_config(folder, f"fp8_{world.size}", stage=3), world)}


def fp8_config(folder: Path, name: str, *, stage: int) -> Config:
    """AdamW's eps is large: what rounding to fp8 makes of rounding in fp32 would else grow."""
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}}
    optim = {"steps": 4, "lr": 1e-3, "eps": 1e-3}
    return build_config(folder, model={"quantization": "fp8"}, optim=optim, **options, **ADAPTERS)


def stop_and_resume(folder: Path, world: World) -> dict:
    """Stops after four steps, keeps a copy of that, and goes on to the end."""
    config = build_config(folder, run={"dir": str(folder / f"resumed_{world.size}")}, **ADAPTERS)
    first = run(config, world, stop_at=4)
    if world.is_main:
        shutil.copytree(config.run.dir, folder / f"stopped_{world.size}", symlinks=True)
    world.gather(None)
    return {"keys": first + run(config, world)}


def resume_other(folder: Path, world: World) -> dict:
    """Continues what one process stopped after four steps."""
    options = {"run": {"dir": str(folder / "stopped_1")}}
    return {"keys": run(build_config(folder, **options, **ADAPTERS), world)}


def damaged_shard(folder: Path, world: World) -> dict:
    """One shard is cut: every rank raises the same line; with on_error = "skip" it is counted."""
    data = {"train": str(folder / "cut")}
    config = build_config(folder, run={"dir": str(folder / "damaged")}, data=data)
    try:
        run(config, world)
        error = ""
    except ValueError as raised:
        error = str(raised)
    options = {"run": {"dir": str(folder / "skipped")}, "optim": {"steps": 4}}
    run(build_config(folder, data=data | {"on_error": "skip"}, **options), world)
    return {"error": error, "skipped": rows(folder / "skipped")[-1]["skipped"]}


def full_disk(folder: Path, world: World) -> dict:
    """The second checkpoint does not fit: every rank raises, the first one stays."""
    options = {"optim": {"steps": 6}, "checkpoint": {"every": 2}}
    config = build_config(folder, run={"dir": str(folder / "full")}, **options)
    save = training.checkpoint.save
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(config, world, engine, stream, step, *rest):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return save(config, world, engine, stream, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return error_of(config, world, limited)


def task_runs(folder: Path, world: World) -> dict:
    """As `learn_task`, sharded.

    Weights are released after each layer, as they are of models that do not fit: backward has to
    gather them again, of the LLM's first layer too, whose input has no gradient of its own.
    """
    released = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), 1)
    released |= {"stage3_param_persistence_threshold": 100}
    zero = {"zero": {"stage": 3}, "deepspeed": {"zero_optimization": released}}
    return {"keys": learn_task(folder, world, f"{world.size}_ranks", zero)}


def whole_task_runs(folder: Path, world: World) -> dict:
    """As `learn_task`, and its evaluation, with the weights whole on each rank."""
    keys = learn_task(folder, world, f"{world.size}_whole", {"zero": {"stage": 0}})
    scores = evaluated_topics(folder, f"evaluate_{world.size}_whole", world, stage=0)
    return {"keys": keys, "scores": scores}


def learn_task(folder: Path, world: World, name: str, zero: dict) -> list[list[str]]:
    """The LLM learns a task, its states are stored, stage 2 learns from them; some ranks idle."""
    finetune, stage2 = (
        {"run": {"dir": str(folder / f"{step}_{name}")}, **zero} for step in ("finetune", "stage2")
    )
    run(finetuning_config(folder, "sib200", **finetune, **UNDROPPED), world)
    config = stage2_config(folder, "sib200", data={"teacher_states": "states"}, **stage2)
    write_targets(config, world)
    return run(config, world)


def texts_in_parts(folder: Path, world: World) -> dict:
    """From a live teacher with the token term, and from states that these ranks store; of three
    ranks one has no line of the probe, two have no document at the end of a validation.
    """
    name = f"parts_{world.size}"
    write_targets(parts_config(folder, f"{name}_stored", states=name), world)
    stored = run(parts_config(folder, f"{name}_stored", states=name), world)
    return {"keys": run(parts_config(folder, name, aligns=True), world) + stored}


def parts_config(
    folder: Path, name: str, *, states: str = "", aligns: bool = False, stage: int = 3
) -> Config:
    data = {"parts": "sentences", "lanes": 3, "pack_documents": 1, "teacher_states": states}
    return build_config(
        folder,
        run={"dir": str(folder / name)},
        model={"projection_init": "least_squares"} if aligns else {},
        data={"train": str(folder / "lines")} | data,
        memory={"max_tokens": 64},
        optim={"steps": 4, "lr": 1e-3},
        objective={"token_weight": 0.5 * aligns},
        validation={"corpus": str(folder / "lines_held_out"), "every": 4},
        probe={"folder": str(folder / "flores") if aligns else ""},
        zero={"stage": stage},
        **UNDROPPED,
    )


def sums(folder: Path, world: World) -> dict:
    """What learns of a sum, and what of it does not, as these ranks read it; stage 2 from it."""
    digests = {}
    for learned in ("all", "first"):
        config = sum_config(folder, f"sum_{learned}_{world.size}", learned, stage=3)
        digests[learned] = adapter_digests(config, world)
        run(config, world)
    return digests


def sum_config(folder: Path, name: str, learned: str, *, stage: int) -> Config:
    """Stage 2 from stage 1 and adapters of other linears, with dropout.

    AdamW's eps is large: else the sign of a gradient near 0, which is rounding's, moves much.
    """
    parts = [str(checkpoint(folder, "stage1", "latest")), str(folder / "other")]
    lora = {**FOLLOWING, "dropout": 0.05, "train": learned}
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}, "lora": lora}
    optim = {"steps": 3, "lr": 0.01, "warmup_ratio": 0.0, "weight_decay": 0.2, "eps": 1e-3}
    return stage2_config(folder, "sib200", model={"init_from": parts}, optim=optim, **options)


def adapter_digests(config: Config, world: World) -> dict[str, str]:
    """Of the student's matrices, gathered from these ranks."""
    config = replace(config, model=replace(config.model, teacher=""))
    stack, weights = build_stack(config)
    shard(stack, weights, config, world)
    adapters = {name: each for name, each in stack.named_parameters() if ".student." in name}
    gathered = contextlib.nullcontext()
    if config.zero.stage == 3:
        gathered = import_deepspeed().zero.GatheredParameters(list(adapters.values()))
    with gathered:
        contents = {name: each.detach().numpy().tobytes() for name, each in adapters.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def families(folder: Path, world: World) -> dict:
    """LLMs of several families: what of their files these ranks read, before three steps."""
    reads = {}
    for llm in sorted((folder / "llms").iterdir()):
        config = family_config(folder, f"{llm.name}_{world.size}", llm, stage=3)
        with recorded_reads() as reads[llm.name]:
            shard(*build_stack(config), config, world)
        run(config, world)
    return reads


def family_config(folder: Path, name: str, llm: Path, *, stage: int) -> Config:
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}}
    optim = {"steps": 3, "lr": 0.01, "warmup_ratio": 0.0, "eps": 1e-3}
    model = {"decoder": str(llm), "projection_init": "linear"}  # the other looks at embeddings
    return build_config(folder, model=model, optim=optim, **options, **UNDROPPED)


@contextlib.contextmanager
def recorded_reads():
    """(file, tensor, first element, end) of all that is read of tensors."""
    reads, read = [], TensorFiles.read

    def recording(self, name: str, start: int, stop: int) -> torch.Tensor:
        reads.append((str(self.path(name)), name, start, stop))
        return read(self, name, start, stop)

    TensorFiles.read = recording
    try:
        yield reads
    finally:
        TensorFiles.read = read


def evaluation(folder: Path, world: World) -> dict:
    """Every system of every kind of task in every language, on these ranks."""
    return evaluated(folder, f"evaluate_{world.size}_ranks", world, stage=3)


def evaluated(folder: Path, name: str, world: World, *, stage: int) -> dict:
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}}
    untranslated = options | {"evaluate": {"systems": ["llm", "stack"]}}
    spans = untranslated | {"model": {"init_from": str(checkpoint(folder, "finetune-xquad-stack"))}}
    with recorded_scores() as scores:
        evaluate(evaluation_config(folder, "sib200", f"sib200:{folder}/topics", **options), world)
        evaluate(
            evaluation_config(folder, "belebele", f"belebele:{folder}/belebele", **untranslated),
            world,
        )
        evaluate(evaluation_config(folder, "xquad", f"xquad:{folder}/squad", **spans), world)
    return scores


def evaluated_topics(folder: Path, name: str, world: World, *, stage: int) -> dict:
    options = {"run": {"dir": str(folder / name)}, "zero": {"stage": stage}}
    with recorded_scores() as scores:
        evaluate(evaluation_config(folder, "sib200", f"sib200:{folder}/topics", **options), world)
    return scores


def joint_forward(folder: Path, world: World) -> dict:
    return count_gathers(folder, world, two_passes=False)


def two_passes(folder: Path, world: World) -> dict:
    return count_gathers(folder, world, two_passes=True)


def count_gathers(folder: Path, world: World, *, two_passes: bool) -> dict:
    """Gathered bytes of the decoder's layers per micro-batch, trace events, and weights pinned by
    the graph.
    """
    zero = {
        "stage3_max_live_parameters": 280_000,
        "stage3_max_reuse_distance": 120_000,
        "stage3_prefetch_bucket_size": 45_000,
        "stage3_param_persistence_threshold": 100,
        "log_trace_cache_warnings": True,
    }
    deep = {"decoder": str(folder / "deep")}
    config = build_config(folder, model=deep, deepspeed={"zero_optimization": zero})
    stack, weights = build_stack(config)
    stream = build_stream(config.data, build_tokenizer(config, stack), world, seed=0)
    engine = ZeroEngine(config, shard(stack, weights, config, world), world)
    if two_passes:
        stack.decoder.forward = lambda hidden, streams: one_by_one(stack, hidden, streams)
    counts, pinned, per_micro_batch, full = Counter(), [], [], full_values(stack)
    with counting(stack, counts):
        for step in range(3):
            global_batch = agree(stream, world, config.memory.max_tokens)
            batches = [batch for _, batch in global_batch.batches(world.device, step)]
            for batch in batches:
                counts["micro_batches"] += 1
                before = counts["bytes"]
                share = engine(batch, global_batch.totals)
                pinned.append(num_pinned_weights(share.loss, stack, full))
                engine.backward(share.loss)
                per_micro_batch.append(counts["bytes"] - before)
            engine.step(1e-3)
            blocking = counts["blocking"]
            with engine.evaluating():  # a forward alone must not cost the next step its trace
                engine(batches[0], global_batch.totals)
            counts["blocking"] = blocking
            if step == 1:  # two steps of warm-up
                counts["blocking"] = counts["invalidations"] = 0
    base = sum(parameter.ds_numel * 4 for parameter in layer_weights(stack))
    stream.close()
    return {"ratios": [count / base for count in per_micro_batch], "pinned": pinned, **counts}


def one_by_one(stack: Stack, hidden, streams) -> tuple:
    """What the joint layer replaces: a pass of all layers for each stream."""
    outputs = []
    for state, stream in zip(hidden, streams):
        for layer in stack.decoder.layers:
            (state,) = layer(state, streams=(stream,))
        outputs.append(state)
    return tuple(outputs)


def layer_weights(stack: Stack) -> list[torch.nn.Parameter]:
    return [each for each in stack.decoder.layers.parameters() if not each.ds_persist]


@contextlib.contextmanager
def counting(stack: Stack, counts: Counter):
    """Counts gathered bytes of the decoder's weights, fetches nobody prefetched, lost traces."""
    import_deepspeed()
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    counted = {id(parameter) for parameter in layer_weights(stack)}
    fetch, invalidate = Coordinator._fetch_sub_module_impl, Coordinator._invalidate_trace
    for parameter in stack.parameters():
        gather = parameter.all_gather_coalesced

        def counting_gather(parameters, *args, gather=gather, **kwargs):
            parameters = list(parameters)
            counts["bytes"] += sum(
                p.ds_numel * p.element_size() for p in parameters if id(p) in counted
            )
            return gather(parameters, *args, **kwargs)

        parameter.all_gather_coalesced = counting_gather

    def counting_fetch(self, module, forward, is_leaf):
        missing = [
            p
            for p in module.parameters(recurse=is_leaf)
            if p.ds_status == ZeroParamStatus.NOT_AVAILABLE
        ]
        counts["blocking"] += bool(missing)
        return fetch(self, module, forward, is_leaf)

    def counting_invalidate(self):
        counts["invalidations"] += 1
        return invalidate(self)

    Coordinator._fetch_sub_module_impl, Coordinator._invalidate_trace = (
        counting_fetch,
        counting_invalidate,
    )
    try:
        yield
    finally:
        Coordinator._fetch_sub_module_impl, Coordinator._invalidate_trace = fetch, invalidate


def full_values(stack: Stack) -> list[torch.Tensor]:
    """The decoder's base matrices, and transposed, as a graph could hold them."""
    with import_deepspeed().zero.GatheredParameters(layer_weights(stack)):
        full = [parameter.detach().clone() for parameter in layer_weights(stack)]
    return full + [value.T for value in full if value.dim() == 2]


def num_pinned_weights(loss: torch.Tensor, stack: Stack, full: list[torch.Tensor]) -> int:
    """Full base matrices that the graph keeps though their layers have been released."""
    status = import_deepspeed().runtime.zero.partition_parameters.ZeroParamStatus
    live = {p.data_ptr() for p in layer_weights(stack) if p.ds_status == status.AVAILABLE}
    released_most = len(live) < len(layer_weights(stack)) / 2
    assert released_most, "the limits released too few layers to see anything"
    kept = {tensor.data_ptr(): tensor for tensor in saved_tensors(loss.grad_fn)}
    others = [kept[pointer] for pointer in kept.keys() - live]
    return sum(any(torch.equal(tensor, value) for value in full) for tensor in others)


def saved_tensors(root) -> list[torch.Tensor]:
    """Everything the graph keeps for backward; what it would compute again is not kept."""
    unpack = activations._unpack
    activations._unpack = lambda saved: saved if isinstance(saved, torch.Tensor) else torch.empty(0)
    tensors, seen, todo = [], set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = list(getattr(node, "saved_tensors", ()))
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        tensors += [item for item in saved if isinstance(item, torch.Tensor)]
        todo += [following for following, _ in node.next_functions]
    activations._unpack = unpack
    return tensors


def padded_encoder(folder: Path, world: World) -> dict:
    """A run under an encoder that is whole on each rank: what each read, and its collectives with
    and without that encoder.
    """
    read: Counter[str] = Counter()
    with counting_reads(read):
        run(padded_config(folder, f"padded_{world.size}"), world)
    run(padded_config(folder, f"padded_{world.size}_whole", stage=0), world)
    pairs = [collectives(folder, world, is_real=is_real) for is_real in (True, False)]
    return {"read": read, "collectives": pairs}


def padded_config(folder: Path, name: str, *, stage: int = 3) -> Config:
    return build_config(
        folder,
        run={"dir": str(folder / name)},
        model={"projection_init": "least_squares"},
        optim={"steps": 3, "lr": 1e-2},
        zero={"stage": stage},
        **UNDROPPED,
    )


@contextlib.contextmanager
def counting_reads(read: Counter):
    """Counts the numbers that are read of each tensor, by its folder's name and its own."""
    original = TensorFiles.read

    def counting_read(self, name: str, start: int, stop: int) -> torch.Tensor:
        read[f"{Path(self.folder).name}/{name}"] += stop - start
        return original(self, name, start, stop)

    TensorFiles.read = counting_read
    try:
        yield
    finally:
        TensorFiles.read = original


def collectives(folder: Path, world: World, *, is_real: bool) -> list[str]:
    """Of three steps, in order. Args: is_real: or the encoder's states are all one, and no model
    runs for them."""
    config = padded_config(folder, "counted")
    stack, weights = build_stack(config)
    stream = build_stream(config.data, build_tokenizer(config, stack), world, seed=0)
    engine = ZeroEngine(config, shard(stack, weights, config, world), world)
    if not is_real:
        width = stack.encoder.width
        stack.encoder = lambda tokens: torch.ones(len(tokens.ids_S), width)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for step in range(3):
            global_batch = agree(stream, world, config.memory.max_tokens)
            train_step(config, world, engine, global_batch, step)
    stream.close()
    return [event.name for event in profiled.events() if event.name.startswith("c10d::")]


def planned(folder: Path, world: World) -> dict:
    """Bytes that this rank holds and gets in a step, by DeepSpeed's limits."""
    return {case: measured(case_config(folder, case), world) for case in CASES}


QUANTISED = ("nf4", "fp8")
TWOFOLD = ("none", "nf4")  # what is tried with a second copy on each machine


def quantised(folder: Path, world: World) -> dict:
    """Steps on sharded payloads, with and without a second copy on each machine; and what is said
    where machines are unequal. Goes on where one rank stopped, sharded and whole, and stops."""
    seen: dict = {"refused": []}
    for kind, secondary in (*itertools.product(TWOFOLD, ("node", "none")), ("fp8", "none")):
        config = quantised_config(folder, "steps", kind, stage=3, secondary=secondary)
        seen[f"{kind} {secondary}"] = sharded_steps(config, world)
    config = quantised_config(folder, "refused", "none", stage=3, secondary="node")
    for local_size in (1, 2 + world.rank % 2):
        try:
            shard(*build_stack(config), config, replace(world, local_size=local_size))
        except ValueError as raised:
            seen["refused"].append(str(raised))
    for kind, stage in itertools.product(QUANTISED, (3, 0)):
        run(quantised_config(folder, f"{kind}_exchanged", kind, stage=stage), world, stop_at=2)
    return seen


def quantised_config(
    folder: Path, name: str, kind: str, *, stage: int, secondary: str = "none"
) -> Config:
    """Eight steps with dropout, and validations. Every weight is released after its layer.

    AdamW's eps is large: what rounding to fp8 makes of rounding in fp32 would else grow.
    """
    released = {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1}
    released |= {"stage3_param_persistence_threshold": 0}
    model = {"decoder": str(folder / ("odd" if kind == "nf4" else "decoder"))}
    dtype = "bfloat16" if kind == "none" else "float32"
    return build_config(
        folder,
        run={"dir": str(folder / name)},
        model=model | {"quantization": kind, "dtype": dtype},
        optim={"steps": 8, "lr": 1e-3, "warmup_ratio": 0.0, "eps": 1e-3},
        validation={"corpus": str(folder / "held_out"), "every": 3},
        zero={"stage": stage, "secondary": secondary},
        deepspeed={"zero_optimization": released},
        **ADAPTERS,
    )


def sharded_steps(config: Config, world: World) -> dict:
    """Three steps: losses, the payloads' digests, bytes that all-gathers brought together from the
    first weight that was read on, and copies of weights that something kept."""
    with counted_gathers(counts := Counter()):
        stack, weights = build_stack(config)
        stream = build_stream(config.data, build_tokenizer(config, stack), world, seed=0)
        engine = ZeroEngine(config, shard(stack, weights, config, world), world)
        losses, kept, passes, full = [], [], 0, payload_values(stack)
        for step in range(3):
            global_batch = agree(stream, world, config.memory.max_tokens)
            for _, batch in global_batch.batches(world.device, step):
                share = engine(batch, global_batch.totals)
                losses.append(share.loss.item())
                if step == 1 and full:
                    kept.append(num_kept(share.loss, full))
                engine.backward(share.loss)
                passes += 2
            losses.append(engine.step(1e-3).item())
    stream.close()
    digests = [hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in full[::3]]
    return {"losses": losses, "digests": digests, "kept": kept, "passes": passes, "bytes": counts}


def payload_values(stack: Stack) -> list[torch.Tensor]:
    """Of each quantised weight a copy of the payload, of the matrix, and of that transposed."""
    values = []
    held = quantised_weights(stack)
    with import_deepspeed().zero.GatheredParameters([each.payload for each in held]):
        for weight in held:
            matrix_FD = weight.full() if hasattr(weight, "full") else weight.weight_FD.clone()
            values += [weight.payload.detach().clone(), matrix_FD, matrix_FD.T.contiguous()]
    return values


def num_kept(loss: torch.Tensor, full: list[torch.Tensor]) -> int:
    """How many tensors, kept by the graph or by anything else, are one of these or a copy."""
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    found += saved_tensors(loss.grad_fn)
    ours = {id(each) for each in full}
    kept = [each for each in found if id(each) not in ours and not each.is_meta]
    return sum(any(is_same(each, value) for value in full) for each in kept)


def is_same(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    is_alike = tensor.shape == value.shape and tensor.dtype == value.dtype
    return is_alike and torch.equal(tensor, value)


@contextlib.contextmanager
def counted_gathers(counts: Counter):
    """Counts the bytes that come together in each all-gather, by the number of ranks in it."""
    import_deepspeed()
    from deepspeed import comm

    originals = {name: getattr(comm, name) for name in ("allgather_fn", "all_gather_into_tensor")}

    def counting(gather):
        def run_gather(output: torch.Tensor, *rest, group=None, **options):
            kind = str(output.dtype).removeprefix("torch.")
            counts[f"{kind} of {comm.get_world_size(group)}"] += output.nbytes
            return gather(output, *rest, group=group, **options)

        return run_gather

    for name, gather in originals.items():
        setattr(comm, name, counting(gather))
    try:
        yield
    finally:
        for name, gather in originals.items():
            setattr(comm, name, gather)


if __name__ == "__main__":
    target, names = Path(sys.argv[1]), sys.argv[2:]
    this_world = connect(timeout_s=HANG_S)
    for scenario in names:
        result = json.dumps(globals()[scenario](target, this_world))
        (target / f"{scenario}_{this_world.size}_{this_world.rank}.json").write_text(result)
    this_world.close()
