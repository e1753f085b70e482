"""swiglu: activation(gate) * up, from one tensor that holds both.

    silu(x)      = x sigmoid(x)
    gelu_tanh(x) = x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
The latter makes it GeGLU, as Gemma has it. The tensor is (S, 2F): the gate's channels, then the
up-projection's; its name and its gradient's say SF. fp32 inside, one rounding at the end; backward
starts from the input, nothing else is kept. What the adapters of the linear before add to it can be
left to be added here, which saves a pass over the widest tensor of a layer.
Source: arXiv 2002.05202, eq. 5 (silu) and 6 (gelu); gelu by tanh arXiv 1606.08415, section 2.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import swiglu as reference


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    ranks: int = 0,
    **activation: str,
) -> dict[str, Any]:
    """Arguments of the op; its activation where one is given, else it takes its own.

    Args:
        ranks: Of an update; 0: there is none.
    """
    arguments = {"gate_up_SF": randn(generator, dtype, tokens, 2 * width, grad=True), **activation}
    if ranks:
        low_SQ = randn(generator, dtype, tokens, ranks) * ranks**-0.5
        arguments["update"] = low_SQ, randn(generator, dtype, 2 * width, ranks)
    return arguments


def cost(
    dtype: torch.dtype, *, tokens: int, width: int, ranks: int = 0, **activation: str
) -> tuple[Cost, Cost]:
    inner, low = tokens * width, 2 * (2 * tokens * width * ranks)
    update = (tokens + 2 * width) * ranks * dtype.itemsize
    forward = Cost(bytes=3 * inner * dtype.itemsize + update, flops=6 * inner + low)
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
        {"tokens": 33, "width": 70, "ranks": 20},
        {"tokens": 7, "width": 33, "activation": "gelu_tanh"},
        {"tokens": 3, "width": 1536},
        {"tokens": 3, "width": 1536, "activation": "gelu_tanh"},
        {"tokens": 130, "width": 130, "ranks": 128, "activation": "gelu_tanh"},
    ),
    shapes=(
        {"tokens": 16384, "width": 14336},
        {"tokens": 16384, "width": 14336, "ranks": 32},
        {"tokens": 4096, "width": 28672},
        {"tokens": 16384, "width": 14336, "activation": "gelu_tanh"},
    ),
    cost=cost,
)
