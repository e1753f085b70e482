"""How a step's gradients meet and the weights move: weights whole on every rank, in plain PyTorch,
or ZeRO-3 by DeepSpeed.

The only file that imports deepspeed. Both engines offer the same few methods, so the training loop
has one form.
"""

import contextlib
import copy
import difflib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mtllm_engine.config import Config, OptimConfig
from mtllm_engine.data.batch import Batch, Tokens, Totals
from mtllm_engine.kernels.lora_linear import check_available
from mtllm_engine.model.decoder import DecoderLayer
from mtllm_engine.model.encoder import EncoderLayer
from mtllm_engine.model.lora import LoraLinear, quantised_weights
from mtllm_engine.model.objective import Share
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.stack import LAYER_NORM_EPS, Stack
from mtllm_engine.model.weights import Weights
from mtllm_engine.progress import warn
from mtllm_engine.world import AgreedError, World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by its own names
CHUNK = 1 << 26  # elements read from a checkpoint at once

_PRECISION = "model.dtype says it of the frozen weights; what is trained is in fp32"
_BATCHES = "data.lanes and data.pack_documents size a step, memory.max_tokens its micro-batches"
_MEMORY = "what is trained, and its moments, is small: to save memory use memory.recompute, "
_MEMORY += "a lower memory.max_tokens, model.quantization or more GPUs"
_GRADIENTS = "gradients are averaged in fp32"
INSTEAD = {
    "optimizer": "use optim.lr, optim.betas, optim.eps and optim.weight_decay (it is AdamW)",
    "scheduler": "use optim.warmup_ratio and optim.steps (the decay is linear)",
    "gradient_clipping": "use optim.clip",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast"), _PRECISION),
    "data_types": _PRECISION,
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "managed_gradient_accumulation": _BATCHES,
    "activation_checkpointing": "use memory.recompute",
    "checkpoint": "use checkpoint.every and checkpoint.keep",
    "prescale_gradients": _GRADIENTS,
    "gradient_predivide_factor": _GRADIENTS,
    "gradient_allreduce_op": _GRADIENTS,
    "zero_optimization.stage": "use zero.stage, which is auto, 0 or 3",
    "zero_optimization.offload_optimizer": _MEMORY,
    "zero_optimization.cpu_offload": _MEMORY,
    "zero_optimization.cpu_offload_use_pin_memory": _MEMORY,
    "zero_optimization.zenflow": _MEMORY,
    "zero_optimization.zero_hpz_partition_size": 'use zero.secondary = "node"',
    "zero_optimization.zero_quantized_weights": "use model.quantization",
    "zero_optimization.zero_quantized_nontrainable_weights": "use model.quantization",
}
"""Keys of DeepSpeed's that people set from habit, and what says it here."""
HARMLESS = {
    "gradient_accumulation_steps": (1,),
    "train_micro_batch_size_per_gpu": (1,),
    "managed_gradient_accumulation": (False,),
    "zero_optimization.stage": (3,),
    "zero_optimization.offload_optimizer": ({"device": "none"},),
    "zero_optimization.cpu_offload": (False,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
}
"""Values of them that say what is so anyway; `enabled = false` is another."""
EXPERT = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers")
EXPERT += ("comms_logger", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet")
EXPERT += ("communication_data_type", "seq_parallel_communication_data_type", "disable_allgather")
EXPERT += ("disable_python_gc", "log_level", "compile", "aio", "zero_optimization")
EXPERT += ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
"""Keys of DeepSpeed's that may be set."""

TrainedState = dict[str, dict[str, torch.Tensor]]
"""Parameter name -> {"value", "exp_avg", "exp_avg_sq"}, fp32, CPU."""


def import_deepspeed():
    """DeepSpeed without its noise, and without the CPU op that needs a compiler at start-up (gloo
    does its work).
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger"
    )
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not torch.cuda.is_available():
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def shard(stack: Stack, weights: Weights, config: Config, world: World) -> Stack:
    """Fills a stack built on the meta device, leaf by leaf; under ZeRO-3 each rank reads and keeps
    only its slices, and of a padded encoder all.

    A quantised base is made full one layer at a time, on every rank: a slice's scales would not be
    the whole weight's.

    Raises:
        ValueError: `model.quantization` or `zero.secondary` asks for what these machines do not
            have, or a weight is not finite.
    """
    check_available(config.model.quantization, world.device, getattr(torch, config.model.dtype))
    _check_nodes(config, world)
    decoder = stack.decoder
    decoder.frequencies = tuple(each.to(world.device) for each in decoder.frequencies)
    if isinstance(stack.encoder, PaddedEncoder):
        world.together(partial(fill_padded, stack.encoder, weights, world))
    names = {id(module): name for name, module in stack.named_modules()}
    for leaf in stack.leaves:
        _materialise(leaf, world.device)
        # A rank that meets a damaged weight takes the others along.
        if config.model.quantization != "none":
            world.together(partial(_quantise, leaf, names[id(leaf)], weights, config, world))
        if config.zero.stage == 3:
            with _named_refusals(config):
                _partition(leaf, deepspeed_config(config, world, stack))
        world.together(partial(_fill_all, leaf, names[id(leaf)], weights, world))
    return stack


def build_engine(config: Config, stack: Stack, world: World) -> "PlainEngine | ZeroEngine":
    """The engine of a layout. Args: config: As `layout.settle` returns it."""
    assert config.zero.stage in (0, 3), "layout.settle decides what auto is"
    return (ZeroEngine if config.zero.stage == 3 else PlainEngine)(config, stack, world)


class PlainEngine:
    """The whole model on every rank: the same methods as `ZeroEngine`.

    What is trained is small, so that its gradients meet in one fp32 sum over the ranks a step.
    """

    def __init__(self, config: Config, stack: Stack, world: World) -> None:
        self.stack, self.world = stack, world
        self.clip = config.optim.clip
        self.optimizer = _build_optimizer(stack, config.optim)
        self.trained = list(_trained(stack).values())
        self.gradients = torch.zeros(sum(map(torch.numel, self.trained)), device=world.device)
        # Backward adds to these parts.
        sizes = [parameter.numel() for parameter in self.trained]
        self.parts = [
            part.view_as(parameter)
            for part, parameter in zip(self.gradients.split(sizes), self.trained, strict=True)
        ]
        for parameter, part in zip(self.trained, self.parts):
            parameter.grad = part

    def __call__(self, batch: Batch, totals: Totals) -> Share:
        return self.stack(batch, totals)

    def backward(self, loss_share: torch.Tensor) -> None:
        """Adds the gradients of a share of the global mean."""
        loss_share.backward()

    def step(self, lr: float) -> torch.Tensor:
        """Sums the ranks' gradients, clips, updates and forgets them; returns their norm before
        clipping. Where that is not finite there is no update, on any rank."""
        pairs = zip(self.trained, self.parts)
        assert all(parameter.grad is part for parameter, part in pairs), "a gradient was replaced"
        _set_lr(self.optimizer, lr)
        self.world.sum(self.gradients)
        # Rank 0's, as GPUs of different makes may round it differently, and would drift apart.
        norm = self.world.sum(nn.utils.get_total_norm(self.parts) * self.world.is_main)
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm)
        # AdamW then leaves values, moments and its own count as they are, without a host wait.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.gradients.zero_()
        return norm.detach()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradients."""
        self.stack.eval()
        with torch.no_grad():
            yield
        self.stack.train()

    @property
    def updates(self) -> int:
        """AdamW's own count: steps with a gradient that was not finite are none."""
        return _updates(self.optimizer)

    def trained_state(self) -> TrainedState:
        """What is trained, with its moments: returned on rank 0 (elsewhere empty).

        Raises:
            ValueError: The ranks hold different numbers, which only a broken device makes.
        """
        self._compare()
        return {
            name: {"value": parameter.detach().cpu().clone()}
            | {key: self.optimizer.state[parameter][key].cpu().clone() for key in MOMENTS}
            for name, parameter in _trained(self.stack).items()
            if self.world.is_main
        }

    @torch.no_grad()
    def load_trained_state(self, state: TrainedState, updates: int) -> None:
        """Continues from `trained_state` after so many updates; every rank passes it whole."""
        for name, parameter in _trained(self.stack).items():
            parameter.copy_(state[name]["value"])
            moments = {key: state[name][key].to(parameter.device, copy=True) for key in MOMENTS}
            self.optimizer.state[parameter] = _adamw_state(updates, moments)

    def _compare(self) -> None:
        """All ranks made the same updates of the same sums, so that all bits must be the same."""
        bits = [each.detach().view(torch.int32).sum(dtype=torch.int64) for each in self.trained]
        sums = [each for (each,) in self.world.gather_ints([int(sum(bits))])]
        if len(set(sums)) > 1:
            odd = next(rank for rank, each in enumerate(sums) if each != sums[0])
            reason = f"rank {odd} has trained other numbers than rank 0, from the same gradients"
            fix = "look at that GPU; the earlier checkpoints are intact"
            raise AgreedError(ValueError(f"{reason}: {fix}"))


class ZeroEngine:
    """DeepSpeed ZeRO-3: every rank holds a slice of everything; one root forward per micro-batch,
    one step per step.
    """

    def __init__(self, config: Config, stack: Stack, world: World) -> None:
        deepspeed = import_deepspeed()
        deepspeed.utils.set_z3_leaf_modules(stack, [EncoderLayer, DecoderLayer])
        self.stack, self.world = stack, world
        self.optimizer = _build_optimizer(stack, config.optim)
        with _named_refusals(config):
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=stack,
                optimizer=self.optimizer,
                config=deepspeed_config(config, world, stack),
                dist_init_required=False,
            )
        if self.optimizer is not None:
            # DeepSpeed averages over ranks, of which the sum is wanted. Its loss scale, 1 / W, is
            # for that: a factor W in the loss would be one of all gradients, which fp8 rounds.
            self.zero.override_loss_scale(1 / world.size)

    def __call__(self, batch: Batch, totals: Totals) -> Share:
        return self.engine(batch, totals)

    def backward(self, loss_share: torch.Tensor) -> None:
        """Adds the gradients of a share of the global mean; the factor and DeepSpeed's loss scale
        cancel."""
        self.engine.backward(loss_share * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> torch.Tensor:
        """Clips, updates and forgets the gradients; returns their norm before clipping. Where that
        is not finite DeepSpeed makes no update."""
        _set_lr(self.optimizer, lr)
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.world.device)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradients."""
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.empty_partition_cache()  # layers kept for a backward that does not come
        self.engine.train()

    @property
    def updates(self) -> int:
        """AdamW's own count: steps with a gradient that was not finite are none."""
        return _updates(self.optimizer)

    def trained_state(self) -> TrainedState:
        """What is trained, with its moments: gathered by all ranks, returned on rank 0 (elsewhere
        empty).
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not any(self.optimizer.state.values()):  # no update yet, whatever the step
            self._create_moments(0)
        state: TrainedState = {}
        for name, parameter in _trained(self.stack).items():
            tensors = {"value": safe_get_full_fp32_param(parameter)}
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if self.world.is_main:
                state[name] = {
                    key: tensor.detach().cpu().clone() for key, tensor in tensors.items()
                }
        return state

    def load_trained_state(self, state: TrainedState, updates: int) -> None:
        """Continues from `trained_state` after so many updates; every rank passes it whole."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self._create_moments(updates)
        trained = _trained(self.stack)
        for name, parameter in trained.items():
            safe_set_local_fp32_param(parameter, self._slice(state[name]["value"], parameter))
            for key in MOMENTS:
                safe_set_local_optimizer_state(
                    parameter, self._slice(state[name][key], parameter), key
                )
        # That set the fp32 masters; the module's own copies (persistent, gathered) are separate
        # tensors.
        for name, parameter in trained.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if self.world.is_main:
                    parameter.copy_(state[name]["value"])

    def _create_moments(self, updates: int) -> None:
        """AdamW would make its state in its first update; here it must exist before."""
        for flat in self.zero.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = _adamw_state(updates, moments)

    def _slice(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's flat slice of a full tensor, with the padding that makes all slices equally
        long.
        """
        size = parameter.ds_tensor.numel()
        flat = tensor.reshape(-1)[size * self.world.rank : size * (self.world.rank + 1)]
        return nn.functional.pad(flat, (0, size - len(flat))).to(self.world.device)


def deepspeed_config(config: Config, world: World, stack: Stack) -> dict[str, Any]:
    """The DeepSpeed dictionary, derived; the user's `[deepspeed]` table is merged over it.

    No `bf16` section: it would turn the fp32 adapters, and the accumulation of their gradients,
    into bf16.

    Raises:
        ValueError: As `check_deepspeed`.
    """
    check_deepspeed(config.deepspeed)
    adapters = [parameter for name, parameter in stack.named_parameters() if ".student." in name]
    layer = sum(_numel(parameter) for parameter in stack.decoder.layers[0].parameters())
    # A byte of a payload counts as a number; as many are live as if the weights were full.
    held = quantised_weights(stack.decoder.layers[0])
    saved = sum(weight.shape.numel() - _numel(weight.payload) for weight in held)
    live = max(1_000_000_000, 4 * (layer + saved))
    derived = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # we say when a step is complete, once
        "gradient_clipping": config.optim.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # kernels.lora_linear saves less
            "overlap_comm": world.device.type == "cuda",
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": max((_numel(p) for p in adapters), default=0),
            # A bucket below a layer's size leaves the rest of each layer to a blocking gather, and
            # so does a budget of live parameters that what is kept for reuse uses up before the
            # next layer is fetched.
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live - 2 * layer,
        },
        "steps_per_print": 1 << 60,
    }
    if keeps_on_node(config, world):
        derived["zero_optimization"]["zero_hpz_partition_size"] = world.local_size
    return _merge(derived, config.deepspeed)


def keeps_on_node(config: Config, world: World) -> bool:
    """Whether each of several machines holds all frozen weights, over its GPUs."""
    return config.zero.secondary == "node" and 1 < world.local_size < world.size


def _check_nodes(config: Config, world: World) -> None:
    """Whether the machines are such that each can hold all frozen weights, if they shall.

    Raises:
        ValueError: They are not.
    """
    if config.zero.secondary == "none" or config.zero.stage == 0:
        return
    sizes, key = world.gather(world.local_size), 'zero.secondary="node"'
    if len(set(sizes)) > 1 or world.size % world.local_size:
        numbers = ", ".join(map(str, sorted(set(sizes))))
        message = f"{key}: machines run {numbers} of {world.size} ranks, and must run equally many"
        raise AgreedError(ValueError(f'{message}; set zero.secondary="none"'))
    if world.local_size == 1 < world.size:
        message = f"{key}: each machine has one rank, which would hold all of it; set zero.stage=0"
        raise AgreedError(ValueError(message))
    if world.local_size == world.size and world.is_main:
        warn(f"{key} changes nothing: all ranks are on one machine")


def check_deepspeed(table: Mapping[str, Any]) -> None:
    """Looks through a `[deepspeed]` table for what DeepSpeed would refuse, overlook or break on.

    Raises:
        ValueError: A key is none that may be set, or its value is none; the message says what to
            use instead.
    """
    for key, value in _flat(table).items():
        message = f"deepspeed.{key} = {json.dumps(value, default=str)}"
        parts = key.split(".")
        known = next((k for k in (parts[0], ".".join(parts[:2])) if k in INSTEAD), "")
        if known and not _is_harmless(known, table):
            raise AgreedError(ValueError(f"{message}: leave it out: {INSTEAD[known]}"))
        if not known and parts[0] not in EXPERT:
            near = difflib.get_close_matches(parts[0], (*EXPERT, *INSTEAD), n=1, cutoff=0.8)
            fix = f"did you mean {near[0]}?" if near else "leave it out"
            raise AgreedError(ValueError(f"{message} would change nothing; {fix}"))
        if value == "auto":
            fix = "only Hugging Face's Trainer fills that in; leave the key out"
            raise AgreedError(ValueError(f"{message}: {fix}"))
    if not isinstance(table.get("zero_optimization", {}), Mapping):
        raise AgreedError(ValueError("deepspeed.zero_optimization must be a table"))


def _is_harmless(key: str, table: Mapping[str, Any]) -> bool:
    value: Any = table
    for part in key.split("."):
        value = value[part]
    is_off = isinstance(value, Mapping) and value.get("enabled") is False
    return is_off or value in HARMLESS.get(key, ())


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; of tables what is in them."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_table = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return flat


@contextlib.contextmanager
def _named_refusals(config: Config) -> Iterator[None]:
    """What DeepSpeed says of the user's table names its keys, in one line.

    Raises:
        ValueError: DeepSpeed refuses it.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    refusals = (AssertionError, TypeError, ValueError, DeepSpeedConfigError, ZeRORuntimeException)
    try:
        yield
    except AgreedError:
        raise
    except refusals as error:
        if not config.deepspeed:
            raise
        keys, message = ", ".join(f"deepspeed.{key}" for key in _flat(config.deepspeed)), str(error)
        if hasattr(error, "errors"):  # pydantic's, which has a page for each
            first = error.errors()[0]
            message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        message = f"{keys}: DeepSpeed refuses: {' '.join(message.split())}"
        raise AgreedError(ValueError(message)) from error  # the table is the same on every rank


def _materialise(leaf: nn.Module, device: torch.device) -> None:
    for module in leaf.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(
                    empty, requires_grad=parameter.requires_grad
                )


def _partition(leaf: nn.Module, config: Mapping[str, Any]) -> None:
    """What is in the leaf already, rank 0 has: it sends that to all before each keeps its slice."""
    deepspeed = import_deepspeed()
    from deepspeed.utils import groups

    is_twofold = "zero_hpz_partition_size" in config["zero_optimization"]
    # The first leaf makes the group of a machine's ranks; DeepSpeed would fail on a second one.
    group = groups._get_zero_param_intra_parallel_group() if is_twofold else None
    deepspeed.zero.Init(
        module=leaf,
        config_dict_or_path=dict(config),
        mem_efficient_linear=False,
        zero_param_parallel_group=group,
    )


def _quantise(leaf: nn.Module, prefix: str, weights: Weights, config: Config, world: World) -> None:
    """Reads the leaf's linears whole, and holds them as `model.quantization` says."""
    for name, module in leaf.named_modules():
        if isinstance(module, LoraLinear):
            fill(module.weight, f"{prefix}.{name}.weight", weights, world)
            module.quantise(config.model.quantization, sharded=config.zero.stage == 3)


def _fill_all(leaf: nn.Module, prefix: str, weights: Weights, world: World) -> None:
    for name, parameter in leaf.named_parameters():
        if not name.endswith(".payload"):  # a quantised weight's, which is there already
            fill(parameter, f"{prefix}.{name}", weights, world)


def fill_padded(encoder: PaddedEncoder, weights: Weights, world: World) -> None:
    """An encoder that is whole on every rank, on this one; reads it once, whoever asks first."""
    if encoder.is_filled:
        return
    encoder.materialise(world.device)
    for name, parameter in encoder.named_parameters():
        fill(parameter, f"encoder.{name}", weights, world)
    encoder.is_filled = True


def encoder_alone(stack: Stack, weights: Weights, world: World) -> Callable[[Tokens], torch.Tensor]:
    """Tokens to what the projection's linear reads (S, E), by the encoder, whole, on this rank's
    device; the stack stays on the meta device.
    """
    if isinstance(stack.encoder, PaddedEncoder):
        fill_padded(stack.encoder, weights, world)
        return stack.encoder
    encoder = copy.deepcopy(stack.encoder).to_empty(device=world.device)
    for name, parameter in encoder.named_parameters():
        fill(parameter, f"encoder.{name}", weights, world)
    width = stack.projection.weight.shape[1]
    norm = [
        weights.read(f"projection.norm_{part}", 0, width).float() for part in ("weight", "bias")
    ]
    norm = [each.to(world.device) for each in norm]
    return lambda tokens: functional.layer_norm(
        encoder(tokens).float(), (width,), *norm, LAYER_NORM_EPS
    )


@torch.no_grad()
def fill(parameter: nn.Parameter, name: str, weights: Weights, world: World) -> None:
    """Copies this rank's flat slices (the whole, when unsharded), a chunk at a time, casting on the
    way in.
    """
    size, slices = _numel(parameter), [(parameter.data.view(-1), 0)]
    if hasattr(parameter, "ds_tensor"):
        slices = [(parameter.ds_tensor, world.rank)]
        if parameter.ds_secondary_tensor is not None:  # of what its machine holds once more
            slices.append((parameter.ds_secondary_tensor, world.rank % world.local_size))
    for target, number in slices:
        offset = target.numel() * number
        stop = min(offset + target.numel(), size)
        target[max(0, size - offset) :].zero_()  # the last ranks' padding
        for start in range(offset, stop, CHUNK):
            end = min(start + CHUNK, stop)
            target[start - offset : end - offset].copy_(weights.read(name, start, end))


def _build_optimizer(stack: Stack, optim: OptimConfig) -> torch.optim.AdamW | None:
    """None where nothing is trained. Fused, for only then it can be told on the device to skip."""
    trained = list(_trained(stack).values())
    options = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": True}
    return (
        torch.optim.AdamW(trained, **options, weight_decay=optim.weight_decay) if trained else None
    )


def _adamw_state(updates: int, moments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(iter(moments.values())).device
    return {"step": torch.tensor(float(updates), device=device), **moments}


def _updates(optimizer: torch.optim.AdamW) -> int:
    return int(next((state["step"] for state in optimizer.state.values() if state), 0))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _trained(stack: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in stack.named_parameters() if parameter.requires_grad
    }


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
