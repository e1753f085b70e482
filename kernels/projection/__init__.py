"""projection: LayerNorm(x) W^T + b, from the encoder's last states to the LLM's width.

x is as it comes before the encoder's final norm, and gets a gradient only when the encoder is
trained. weight (D, E) and bias (D,) are fp32 parameters and trained, cast to x's dtype where used;
the norm's weight and bias (E,) are frozen; statistics are fp32.
Source: arXiv 2406.12739, section 3; LayerNorm arXiv 1607.06450.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import projection as reference


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    out_width: int,
    bias: bool,
    grad: bool,
) -> dict[str, Any]:
    x_SE = randn(generator, dtype, tokens, width, grad=grad)
    norm_weight_E = 1 + 0.1 * randn(generator, dtype, width)
    norm_bias_E = 0.1 * randn(generator, dtype, width)
    weight_DE = randn(generator, torch.float32, out_width, width) * width**-0.5
    return {
        "x_SE": x_SE,
        "norm_weight_E": norm_weight_E,
        "norm_bias_E": norm_bias_E,
        "eps": 1e-5,
        "weight_DE": weight_DE.requires_grad_(),
        "bias_D": randn(generator, torch.float32, out_width, grad=True) if bias else None,
    }


def cost(
    dtype: torch.dtype, *, tokens: int, width: int, out_width: int, bias: bool, grad: bool
) -> tuple[Cost, Cost]:
    gemm = 2 * tokens * width * out_width
    weight = width * out_width * 4
    states, outputs = tokens * width * dtype.itemsize, tokens * out_width * dtype.itemsize
    products = 2 if grad else 1
    forward = Cost(bytes=states + weight + outputs, flops=gemm)
    backward = Cost(bytes=outputs + products * (states + weight), flops=products * gemm)
    return forward, backward


projection = Kernel(
    name="projection",
    reference=reference,
    implementations={
        "cuBLAS + triton": Implementation("cuda", "triton", "projection.fused:projection")
    },
    inputs=inputs,
    cases=(
        {"tokens": 1, "width": 16, "out_width": 16, "bias": False, "grad": False},
        {"tokens": 37, "width": 48, "out_width": 80, "bias": True, "grad": True},
        {"tokens": 70, "width": 200, "out_width": 136, "bias": True, "grad": False},
    ),
    shapes=(
        {"tokens": 16384, "width": 1024, "out_width": 4096, "bias": True, "grad": False},
        {"tokens": 16384, "width": 2048, "out_width": 8192, "bias": True, "grad": False},
    ),
    cost=cost,
)
