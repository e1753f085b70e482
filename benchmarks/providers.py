"""Ways to compute an op, for benchmarks/kernels.py: ours, PyTorch's and what libraries offer."""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from mtllm_engine.kernels.agreement import disagreements
from mtllm_engine.kernels.contract import Kernel, Update
from mtllm_engine.kernels.lora_linear import Dropout
from torch import nn
from torch.nn import functional

Arguments = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """One way.

    `load` returns the function, or raises ImportError. `adapt` makes the op's arguments the
    function's, `join` its outputs the op's; neither is timed. Arguments in `without` are None while
    it is checked, for it draws random numbers of its own. A `partial` one computes less than the
    op: a floor, and not checked.
    """

    name: str
    load: Callable[[], Function]
    adapt: Callable[..., Arguments] = dict
    join: Callable[[Any, Arguments], Any] = lambda outputs, arguments: outputs
    without: tuple[str, ...] = ()
    partial: bool = False

    def problems(self, kernel: Kernel, arguments: Arguments) -> list[str]:
        """What disagrees with the op's definition."""
        function = self.load()

        def as_defined(**arguments: Any) -> Any:
            return self.join(function(**self.adapt(**arguments)), arguments)

        if self.partial:
            return []
        return disagreements(kernel, as_defined, arguments | dict.fromkeys(self.without))


def providers(kernel: Kernel, device: str, dtype: torch.dtype) -> Iterator[Provider]:
    """All that there are for an op on a device; whether they can be had is for `load` to say."""
    for label, implementation in kernel.implementations.items():
        if implementation.device == device and dtype in implementation.dtypes:
            yield Provider(label, functools.partial(getattr, implementation, "function"))
    yield Provider("eager", lambda: kernel.reference)
    # Attention's definition loops over documents: a graph for every list of lengths
    if kernel.name != "attention":
        yield Provider("torch.compile", lambda: torch.compile(kernel.reference, dynamic=False))
    if device == "cuda":
        yield from LIGER.get(kernel.name, ())
    yield from LIBRARIES.get(kernel.name, ())


def from_liger(location: str, name: str) -> Function:
    """The autograd function `name`, as a function."""
    module = importlib.import_module(f"liger_kernel.ops.{location}")
    if not hasattr(module, name):
        raise ImportError(f"liger-kernel {metadata.version('liger-kernel')} has no {name}")
    return getattr(module, name).apply


def liger_rms_norm() -> Function:
    plain = from_liger("rms_norm", "LigerRMSNormFunction")
    added = from_liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")

    def rms_norm(
        x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_SD: torch.Tensor | None
    ) -> Any:
        if residual_SD is None:
            return plain(x_SD, weight_D, eps), x_SD
        return added(x_SD, residual_SD, weight_D, eps)

    return rms_norm


def liger_rope() -> Function:
    rope = from_liger("rope", "LigerRopeFunction")
    return lambda q_1HSK, k_1GSK, cos_1SK, sin_1SK: rope(q_1HSK, k_1GSK, cos_1SK, sin_1SK)


def separate_heads(
    heads_SXK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int
) -> Arguments:
    """Queries and keys, 4 to 1, as linears of their own would give them.

    Liger rotates those without copying first.
    """
    num_queries = num_rotated * 4 // 5
    parts = heads_SXK[:, :num_queries], heads_SXK[:, num_queries:num_rotated]
    q_1HSK, k_1GSK = (x.contiguous().transpose(0, 1)[None] for x in parts)
    cos_1SK, sin_1SK = (torch.cat([x, x], dim=1)[None] for x in (cos_Sk, sin_Sk))
    return {"q_1HSK": q_1HSK, "k_1GSK": k_1GSK, "cos_1SK": cos_1SK, "sin_1SK": sin_1SK}


def join_heads(outputs: tuple[torch.Tensor, ...], arguments: Arguments) -> torch.Tensor:
    turned = [x_1HSK[0].transpose(0, 1) for x_1HSK in outputs]
    return torch.cat([*turned, arguments["heads_SXK"][:, arguments["num_rotated"] :]], dim=1)


def liger_swiglu() -> Function:
    swiglu = from_liger("swiglu", "LigerFusedGateUpSiLUMulFunction")
    geglu = from_liger("geglu", "LigerGELUMulFunction")

    def gated(
        gate_up_SF: torch.Tensor, activation: str = "silu", update: Update | None = None
    ) -> torch.Tensor:
        if update is not None:
            gate_up_SF = torch.addmm(gate_up_SF, update[0], update[1].T)
        return swiglu(gate_up_SF) if activation == "silu" else geglu(*gate_up_SF.chunk(2, dim=1))

    return gated


def layer_norm_and_linear(
    x_SE: torch.Tensor,
    norm_weight_E: torch.Tensor,
    norm_bias_E: torch.Tensor,
    eps: float,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    normed_SE = functional.layer_norm(x_SE, x_SE.shape[-1:], norm_weight_E, norm_bias_E, eps)
    bias_D = None if bias_D is None else bias_D.to(x_SE.dtype)
    return functional.linear(normed_SE, weight_DE.to(x_SE.dtype), bias_D)


def frozen_linear(
    x_SD: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None, **_: Any
) -> torch.Tensor:
    return functional.linear(x_SD, weight_FD, bias_F)


class Members(nn.ModuleDict):
    """The linears of a group one by one, as PEFT finds them in a model."""

    def forward(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x_SD) for linear in self.values())


def import_peft() -> Any:
    """PEFT, without what bitsandbytes tells of a CPU kernel that it would like to fetch."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("peft")


def peft_lora() -> Function:
    import_peft()

    def lora(
        x_SD: torch.Tensor, group: Members, parameters: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        return torch.func.functional_call(group, parameters, (x_SD,))

    return lora


def separate_members(
    x_SD: torch.Tensor,
    weight_FD: torch.Tensor,
    bias_F: torch.Tensor | None,
    adapters: tuple[tuple[int, torch.Tensor, torch.Tensor], ...],
    scale: float,
    dropout: Dropout | None,
) -> Arguments:
    """PEFT's modules over the same weights, adapters in the compute dtype: its fastest setting."""
    edges = {edge for start, _, b in adapters for edge in (start, start + len(b))}
    starts = sorted({0} | edges)
    ends = [*starts[1:], len(weight_FD)]
    bounds = [(start, end) for start, end in zip(starts, ends) if start < end]
    names = {start: f"linear{number}" for number, (start, _) in enumerate(bounds)}
    rank, p = len(adapters[0][1]), 0.0 if dropout is None else dropout.p
    widths = {names[start]: end - start for start, end in bounds}
    targets = [names[start] for start, _, _ in adapters]
    config = {"r": rank, "lora_alpha": scale * rank, "lora_dropout": p}
    group = peft_group(x_SD.shape[1], widths, bias_F is not None, targets, config)
    adapted, parameters = {start: pair for start, *pair in adapters}, {}
    for start, end in bounds:
        inner = f"{names[start]}.base_layer" if start in adapted else names[start]
        parameters[f"{inner}.weight"] = weight_FD[start:end]
        if bias_F is not None:
            parameters[f"{inner}.bias"] = bias_F[start:end]
        for kind, matrix in zip("AB", adapted.get(start, ())):
            parameters[f"{names[start]}.lora_{kind}.default.weight"] = matrix.to(x_SD.dtype)
    return {"x_SD": x_SD, "group": group, "parameters": parameters}


def peft_group(
    width: int, widths: dict[str, int], bias: bool, targets: list[str], config: dict[str, Any]
) -> Members:
    """Without storage: `functional_call` brings the weights."""
    peft = import_peft()
    options = {"bias": bias, "device": "meta"}
    linears = {name: nn.Linear(width, out, **options) for name, out in widths.items()}
    config = peft.LoraConfig(target_modules=targets, **config)
    return peft.inject_adapter_in_model(config, Members(linears), low_cpu_mem_usage=True).train()


LIGER = {
    "rms_norm": (Provider("Liger", liger_rms_norm),),
    "rope": (Provider("Liger", liger_rope, separate_heads, join_heads),),
    "swiglu": (Provider("Liger", liger_swiglu),),
}
LIBRARIES = {
    "projection": (Provider("LayerNorm + GEMM", lambda: layer_norm_and_linear),),
    "lora_linear": (
        Provider("frozen GEMM alone", lambda: frozen_linear, partial=True),
        Provider(
            "PEFT",
            peft_lora,
            separate_members,
            lambda outputs, _: torch.cat(outputs, dim=1),
            without=("dropout",),
        ),
    ),
}
