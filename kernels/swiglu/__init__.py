"""swiglu: activation(gate) * up, from one tensor that holds both.

    silu(x)      = x sigmoid(x)
    gelu_tanh(x) = x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
The latter makes it GeGLU, as Gemma has it. The tensor is (S, 2F): the gate's channels, then the
up-projection's; its name and its gradient's say SF. fp32 inside, one rounding at the end; backward
starts from the input, nothing else is kept.
Source: arXiv 2002.05202, eq. 5 (silu) and 6 (gelu); gelu by tanh arXiv 1606.08415, section 2.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import swiglu as reference


def inputs(
    generator: torch.Generator, dtype: torch.dtype, *, tokens: int, width: int, **activation: str
) -> dict[str, Any]:
    """Arguments of the op; its activation where one is given, else it takes its own."""
    return {"gate_up_SF": randn(generator, dtype, tokens, 2 * width, grad=True), **activation}


def cost(dtype: torch.dtype, *, tokens: int, width: int, **activation: str) -> tuple[Cost, Cost]:
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
    cases=(
        {"tokens": 1, "width": 8},
        {"tokens": 7, "width": 33, "activation": "gelu_tanh"},
        {"tokens": 3, "width": 1536},
        {"tokens": 3, "width": 1536, "activation": "gelu_tanh"},
    ),
    shapes=(
        {"tokens": 16384, "width": 14336},
        {"tokens": 4096, "width": 28672},
        {"tokens": 16384, "width": 14336, "activation": "gelu_tanh"},
    ),
    cost=cost,
)
