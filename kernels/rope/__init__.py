"""rope: rotates channel pairs (i, i + k) of the first `num_rotated` heads of a packed q/k/v.

These are the queries, then the keys. Heads (S, H + 2G, K); cos and sin of the angles are fp32
(S, k), one row per token, whatever document it is of, and may both carry a factor. Channels from 2k
on stay as they are (partial rotary, as Phi-4-mini's). An implementation may work in place.
Source: arXiv 2104.09864, eq. 34; halves, not neighbours, as in Hugging Face's Llama.

Letters, beside the project's legend: X all heads, H + 2G of them, k pairs of channels, up to K/2.
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
    pairs: int | None = None,
) -> dict[str, Any]:
    """Arguments of the op; all channels are in pairs unless their number is given."""
    pairs = width // 2 if pairs is None else pairs
    angles_Sk = 10 * randn(generator, torch.float32, tokens, pairs)
    return {
        "heads_SXK": randn(generator, dtype, tokens, heads, width, grad=True),
        "cos_Sk": 1.2 * angles_Sk.cos(),
        "sin_Sk": 1.2 * angles_Sk.sin(),
        "num_rotated": rotated,
    }


def cost(
    dtype: torch.dtype,
    *,
    tokens: int,
    heads: int,
    rotated: int,
    width: int,
    pairs: int | None = None,
) -> tuple[Cost, Cost]:
    turned = width if pairs is None else 2 * pairs
    states = tokens * rotated * turned
    once = Cost(bytes=2 * states * dtype.itemsize + 4 * tokens * turned, flops=3 * states)
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
        {"tokens": 2, "heads": 7, "rotated": 6, "width": 10, "pairs": 3},
        {"tokens": 2, "heads": 7, "rotated": 7, "width": 6},
        {"tokens": 3, "heads": 6, "rotated": 5, "width": 128},
        {"tokens": 2, "heads": 24, "rotated": 18, "width": 128},
        {"tokens": 2, "heads": 12, "rotated": 10, "width": 128, "pairs": 48},
    ),
    shapes=(
        {"tokens": 16384, "heads": 48, "rotated": 40, "width": 128},
        {"tokens": 16384, "heads": 96, "rotated": 80, "width": 64},
        {"tokens": 16384, "heads": 40, "rotated": 32, "width": 128, "pairs": 48},
    ),
    cost=cost,
)
