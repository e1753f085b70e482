"""swiglu: silu(gate) * up, from one tensor that holds both.

This is (S, 2F): the gate's channels, then the up-projection's; its name and its gradient's say SF.
fp32 inside, one rounding at the end; backward starts from the input, nothing else is kept.
Source: arXiv 2002.05202, eq. 5.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import swiglu as reference


def inputs(
    generator: torch.Generator, dtype: torch.dtype, *, tokens: int, width: int
) -> dict[str, Any]:
    return {"gate_up_SF": randn(generator, dtype, tokens, 2 * width, grad=True)}


def cost(dtype: torch.dtype, *, tokens: int, width: int) -> tuple[Cost, Cost]:
    inner = tokens * width
    forward = Cost(bytes=3 * inner * dtype.itemsize, flops=6 * inner)
    return forward, Cost(bytes=5 * inner * dtype.itemsize, flops=12 * inner)


swiglu = Kernel(
    name="swiglu",
    reference=reference,
    implementations={
        "c++": Implementation("cpu", "c++", "swiglu.native:swiglu"),
        "triton": Implementation("cuda", "triton", "swiglu.fused:swiglu"),
    },
    inputs=inputs,
    cases=({"tokens": 1, "width": 8}, {"tokens": 7, "width": 33}, {"tokens": 3, "width": 1536}),
    shapes=({"tokens": 16384, "width": 14336}, {"tokens": 4096, "width": 28672}),
    cost=cost,
)
