"""rope: rotates channel pairs (k, k + K/2) of the first `num_rotated` heads of a packed q/k/v.

These are the queries, then the keys. Heads (S, H + 2G, K); cos and sin of the angles are fp32
(S, K/2), one row per token, whatever document it is of. An implementation may work in place.
Source: arXiv 2104.09864, eq. 34; halves, not neighbours, as in Hugging Face's Llama.

Letters, beside the project's legend: X all heads, H + 2G of them, k pairs of channels, K/2 of them.
"""

from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import rope as reference


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    tokens: int,
    heads: int,
    rotated: int,
    width: int,
) -> dict[str, Any]:
    angles_Sk = 10 * randn(generator, torch.float32, tokens, width // 2)
    return {
        "heads_SXK": randn(generator, dtype, tokens, heads, width, grad=True),
        "cos_Sk": angles_Sk.cos(),
        "sin_Sk": angles_Sk.sin(),
        "num_rotated": rotated,
    }


def cost(
    dtype: torch.dtype, *, tokens: int, heads: int, rotated: int, width: int
) -> tuple[Cost, Cost]:
    states = tokens * rotated * width
    once = Cost(bytes=2 * states * dtype.itemsize + 4 * tokens * width, flops=3 * states)
    return once, once


rope = Kernel(
    name="rope",
    reference=reference,
    implementations={
        "c++": Implementation("cpu", "c++", "rope.native:rope"),
        "triton": Implementation("cuda", "triton", "rope.fused:rope"),
    },
    inputs=inputs,
    cases=(
        {"tokens": 1, "heads": 3, "rotated": 2, "width": 8},
        {"tokens": 5, "heads": 8, "rotated": 6, "width": 12},
        {"tokens": 2, "heads": 7, "rotated": 7, "width": 6},
        {"tokens": 3, "heads": 6, "rotated": 5, "width": 128},
        {"tokens": 2, "heads": 24, "rotated": 18, "width": 128},
    ),
    shapes=(
        {"tokens": 16384, "heads": 48, "rotated": 40, "width": 128},
        {"tokens": 16384, "heads": 96, "rotated": 80, "width": 64},
    ),
    cost=cost,
)
