"""attention: softmax(q k^T / sqrt(K)) v inside each packed document; causal or bidirectional, grouped-query.

q (S, H, K), k and v (S, G, K); `cu_seqlens` int32 (N+1,) on the device and the same lengths on the host.
Source: arXiv 1706.03762, eq. 1; grouped queries arXiv 2305.13245.
"""

import itertools
from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .reference import attention as reference


def inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    width: int,
    causal: bool,
) -> dict[str, Any]:
    tokens = sum(lengths)
    ends = [0, *itertools.accumulate(lengths)]
    return {
        "q_SHK": randn(generator, dtype, tokens, heads, width, grad=True),
        "k_SGK": randn(generator, dtype, tokens, kv_heads, width, grad=True),
        "v_SGK": randn(generator, dtype, tokens, kv_heads, width, grad=True),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=generator.device),
        "lengths": tuple(lengths),
        "causal": causal,
    }


def cost(
    dtype: torch.dtype, *, lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, causal: bool
) -> tuple[Cost, Cost]:
    states = sum(lengths) * width * dtype.itemsize * 2 * (heads + kv_heads)
    flops = sum(4 * length * length * heads * width for length in lengths) // (2 if causal else 1)
    return Cost(bytes=states, flops=flops), Cost(bytes=2 * states, flops=5 * flops // 2)


_LLAMA = {"heads": 32, "kv_heads": 8, "width": 128}

attention = Kernel(
    name="attention",
    reference=reference,
    implementations={
        "torch SDPA by document": Implementation("cpu", "torch", "attention.library:attention_sdpa"),
        "torch varlen_attn": Implementation("cuda", "torch", "attention.library:attention_varlen"),
    },
    inputs=inputs,
    cases=(
        {"lengths": (1, 7, 3), "heads": 8, "kv_heads": 2, "width": 64, "causal": False},
        {"lengths": (33, 1), "heads": 4, "kv_heads": 4, "width": 64, "causal": True},
        {"lengths": (5, 18), "heads": 4, "kv_heads": 1, "width": 128, "causal": True},
    ),
    shapes=(
        {**_LLAMA, "lengths": (512,) * 32, "causal": False},
        {**_LLAMA, "lengths": (512,) * 32, "causal": True},
        {"heads": 16, "kv_heads": 16, "width": 64, "lengths": (512,) * 32, "causal": False},
        {**_LLAMA, "lengths": (40,) * 410, "causal": False},
    ),
    cost=cost,
)
