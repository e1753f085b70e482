"""lora_linear: y = x W^T + b + scale * drop(x) A^T B^T, with W and b frozen.

For one linear or a fused group of them (q/k/v, gate/up): W stacks the members' weights along its
output, and each adapted member has its own A, B, mask.
Source: arXiv 2106.09685, eq. 3; dropout on the adapter's input as in PEFT.

Letters, beside the project's legend: D input and F output width of whichever linear, f output width
of one adapter, Q ranks of all adapters, C parts of a split sum, s some of the tokens; I input and O
output width of a product with a quantised weight, D and F in forward, F and D in backward.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .dropout import Dropout
from .quantised import Quantised, check_available, quantise
from .reference import lora_linear as reference

__all__ = ["Dropout", "Quantised", "check_available", "lora_linear", "quantise"]


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    members: tuple[int, ...],
    adapted: tuple[int, ...],
    rank: int,
    dropout: float,
    bias: bool,
) -> dict[str, Any]:
    """Args: members: output widths of the group's linears. adapted: which have an adapter."""
    starts = [sum(members[:member]) for member in adapted]
    adapters = tuple(
        (
            start,
            (randn(generator, torch.float32, rank, width) * width**-0.5).requires_grad_(),
            (randn(generator, torch.float32, members[member], rank) * rank**-0.5).requires_grad_(),
        )
        for start, member in zip(starts, adapted)
    )
    options = {"generator": generator, "device": generator.device, "dtype": torch.int32}
    seeds_S = torch.randint(-(2**31), 2**31, (tokens,), **options)
    masks = Dropout(p=dropout, seeds_S=seeds_S, linears=tuple(adapted))
    return {
        "x_SD": randn(generator, dtype, tokens, width, grad=True),
        "weight_FD": randn(generator, dtype, sum(members), width) * width**-0.5,
        "bias_F": randn(generator, dtype, sum(members)) if bias else None,
        "adapters": adapters,
        "scale": 2.0,
        "dropout": masks if dropout and adapted else None,
    }


def cost(
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    members: tuple[int, ...],
    adapted: tuple[int, ...],
    rank: int,
    dropout: float,
    bias: bool,
) -> tuple[Cost, Cost]:
    base = 2 * tokens * width * sum(members)
    low = 2 * tokens * rank * sum(width + members[member] for member in adapted)
    states = (tokens * (width + sum(members)) + width * sum(members)) * dtype.itemsize
    inputs_again = tokens * width * dtype.itemsize
    forward = Cost(bytes=states, flops=base + low)
    return forward, Cost(bytes=states + inputs_again, flops=base + 2 * low)


_QKV = {"width": 4096, "members": (4096, 1024, 1024), "adapted": (0, 1, 2)}
_GATE_UP = {"width": 4096, "members": (14336, 14336), "adapted": (0, 1)}
_LLAMA = {"tokens": 16384, "rank": 16, "dropout": 0.0, "bias": False}

lora_linear = Kernel(
    name="lora_linear",
    reference=reference,
    implementations={
        "torch GEMMs": Implementation("cpu", "torch", "lora_linear.library:lora_linear"),
        "cuBLAS + triton": Implementation("cuda", "triton", "lora_linear.fused:lora_linear"),
        "cuBLAS": Implementation("cuda", "torch", "lora_linear.library:lora_linear"),
    },
    inputs=inputs,
    cases=(
        {
            "tokens": 1,
            "width": 16,
            "members": (16,),
            "adapted": (),
            "rank": 4,
            "dropout": 0.0,
            "bias": True,
        },
        {
            "tokens": 9,
            "width": 48,
            "members": (32, 16, 16),
            "adapted": (0, 2),
            "rank": 4,
            "dropout": 0.1,
            "bias": True,
        },
        {
            "tokens": 33,
            "width": 40,
            "members": (72, 72),
            "adapted": (0, 1),
            "rank": 16,
            "dropout": 0.5,
            "bias": False,
        },
        {
            "tokens": 70,
            "width": 130,
            "members": (136,),
            "adapted": (0,),
            "rank": 8,
            "dropout": 0.0,
            "bias": False,
        },
        {
            "tokens": 21,
            "width": 96,
            "members": (80, 48),
            "adapted": (0, 1),
            "rank": 80,
            "dropout": 0.25,
            "bias": True,
        },
    ),
    shapes=(
        {**_LLAMA, **_QKV},
        {**_LLAMA, **_QKV, "dropout": 0.05},
        {**_LLAMA, "width": 4096, "members": (4096,), "adapted": (0,)},
        {**_LLAMA, **_GATE_UP},
        {**_LLAMA, "width": 14336, "members": (4096,), "adapted": (0,)},
    ),
    cost=cost,
)
