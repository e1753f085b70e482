"""rms_norm: h = x + residual (if given), y = h / sqrt(mean(h^2) + eps) * weight; (y, h) out.

Over the last dimension, with statistics in fp32; the weight is frozen and gets no gradient.
Source: arXiv 1910.07467, eq. 4. Rounding as in Llama (the normalised value is rounded to x's dtype,
then scaled), but where the weight is fp32 as in Gemma (scaled, then rounded).

Letters, beside the project's legend: D is the width of whatever is normed, S how many there are:
tokens, or the heads of all tokens.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import rms_norm as reference


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    residual: bool,
    fp32_weight: bool = False,
) -> dict[str, Any]:
    weight_dtype = torch.float32 if fp32_weight else dtype
    return {
        "x_SD": randn(generator, dtype, tokens, width, grad=True),
        "weight_D": 1 + 0.1 * randn(generator, weight_dtype, width),
        "eps": 1e-5,
        "residual_SD": randn(generator, dtype, tokens, width, grad=True) if residual else None,
    }


def cost(
    dtype: torch.dtype, *, tokens: int, width: int, residual: bool, fp32_weight: bool = False
) -> tuple[Cost, Cost]:
    state = tokens * width
    forward = Cost(bytes=(4 if residual else 2) * state * dtype.itemsize, flops=4 * state)
    backward = Cost(bytes=(4 if residual else 3) * state * dtype.itemsize, flops=8 * state)
    return forward, backward


rms_norm = Kernel(
    name="rms_norm",
    reference=reference,
    implementations={
        "c++": Implementation("cpu", "c++", "rms_norm.native:rms_norm"),
        "triton": Implementation("cuda", "triton", "rms_norm.fused:rms_norm"),
    },
    inputs=inputs,
    cases=(
        {"tokens": 1, "width": 8, "residual": False},
        {"tokens": 5, "width": 48, "residual": True, "fp32_weight": True},
        {"tokens": 3, "width": 1000, "residual": True},
        {"tokens": 40, "width": 63, "residual": True},
        {"tokens": 2, "width": 4096, "residual": False},
        {"tokens": 40, "width": 128, "residual": False, "fp32_weight": True},
    ),
    shapes=(
        {"tokens": 16384, "width": 4096, "residual": False},
        {"tokens": 16384, "width": 4096, "residual": True},
        {"tokens": 16384, "width": 8192, "residual": True},
        # Gemma 2 9B's states, and the queries' heads of Qwen3 8B
        {"tokens": 16384, "width": 3584, "residual": True, "fp32_weight": True},
        {"tokens": 16384 * 32, "width": 128, "residual": False},
    ),
    cost=cost,
)
