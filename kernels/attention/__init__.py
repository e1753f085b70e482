"""attention: softmax(q k^T / sqrt(K)) v inside each packed document.

Causal or bidirectional, grouped-query. q (S, H, K), k and v (S, G, K); `cu_seqlens` int32 (N+1,) on
the device and the same lengths on the host. With a `softcap`, which not all implementations take
(`select` knows), a score s becomes softcap * tanh(s / softcap), before mask and softmax.
Source: arXiv 1706.03762, eq. 1; grouped queries arXiv 2305.13245; soft cap arXiv 2408.00118,
section 2.

Letters, beside the project's legend: L is the length of one document, or of N equally long ones.
"""

import dataclasses
import itertools
import math
import statistics
from typing import Any

import torch
from mtllm_engine.kernels.contract import Cost, Implementation, Kernel, randn

from .library import HALVES, grouped
from .measured import fastest
from .reference import attention as reference

__all__ = ["attention", "grouped", "select"]


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
    dtype: torch.dtype,
    *,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    width: int,
    causal: bool,
) -> tuple[Cost, Cost]:
    states = sum(lengths) * width * dtype.itemsize * 2 * (heads + kv_heads)
    flops = sum(4 * length * length * heads * width for length in lengths) // (2 if causal else 1)
    return Cost(bytes=states, flops=flops), Cost(bytes=2 * states, flops=5 * flops // 2)


def mixed(median: int, tokens: int = 16384, longest: int = 512) -> tuple[int, ...]:
    """Lengths of a pack's documents: log-normal, cut at the longest, always the same ones."""
    normal, step = statistics.NormalDist(math.log(median), 0.8), (5**0.5 - 1) / 2
    lengths: list[int] = []
    while True:
        quantile = (0.5 + len(lengths) * step) % 1  # evenly spread, and in no order
        length = min(longest, max(1, round(math.exp(normal.inv_cdf(quantile)))))
        if sum(lengths) + length > tokens:
            return tuple(lengths)
        lengths.append(length)


_PACKAGE = {"device": "cuda", "source": "package", "dtypes": HALVES, "has_run": False}
_LLAMA = {"heads": 32, "kv_heads": 8}
_LENGTHS = ((512,) * 32, mixed(350), mixed(40))

attention = Kernel(
    name="attention",
    reference=reference,
    implementations={
        "torch SDPA": Implementation("cpu", "torch", "attention.library:attention_sdpa"),
        "torch varlen_attn, FlashAttention 2": Implementation(
            "cuda", "torch", "attention.library:attention_varlen", dtypes=HALVES
        ),
        "torch cuDNN": Implementation(
            "cuda", "torch", "attention.cudnn:attention_cudnn", dtypes=HALVES, has_run=False
        ),
        "flash-attn": Implementation(
            location="attention.library:attention_flash_attn",
            package="flash_attn.flash_attn_interface",  # flash-attn-4 brings a flash_attn too
            **_PACKAGE,
        ),
        "flash-attn-4": Implementation(
            location="attention.library:attention_flash_attn_4",
            package="flash_attn.cute",
            **_PACKAGE,
        ),
        "torch varlen_attn, FlashAttention 3": Implementation(
            location="attention.library:attention_fa3", package="flash_attn_interface", **_PACKAGE
        ),
    },
    inputs=inputs,
    cases=(
        {"lengths": (1, 7, 3), "heads": 8, "kv_heads": 2, "width": 64, "causal": False},
        {"lengths": (33, 1), "heads": 4, "kv_heads": 4, "width": 64, "causal": True},
        {"lengths": (5, 18), "heads": 4, "kv_heads": 1, "width": 128, "causal": True},
        {"lengths": (6, 6, 2, 2, 2, 6), "heads": 4, "kv_heads": 2, "width": 32, "causal": True},
        {"lengths": (9, 2), "heads": 2, "kv_heads": 2, "width": 96, "causal": False},
        # Longer than a head is wide
        {"lengths": (150, 3, 1), "heads": 4, "kv_heads": 2, "width": 64, "causal": False},
    ),
    shapes=(
        *(
            {**_LLAMA, "width": width, "lengths": lengths, "causal": causal}
            for width, lengths, causal in itertools.product((128, 96, 64), _LENGTHS, (False, True))
        ),
        {"heads": 16, "kv_heads": 16, "width": 64, "lengths": (512,) * 32, "causal": False},
    ),
    cost=cost,
)

_FLASH = "torch varlen_attn, FlashAttention"
_BACKENDS = {  # model.attention -> labels, best first
    "auto": ("torch SDPA", f"{_FLASH} 2"),
    "torch": ("torch SDPA", f"{_FLASH} 3", f"{_FLASH} 2"),
    "cudnn": ("torch cuDNN",),
    "flash_attn": ("flash-attn",),
    "flash_attn_4": ("flash-attn-4",),
    "reference": (),
}
_CAPPED = {"flash-attn": "flash_attn", "flash-attn-4": "flash_attn_4"}  # take a `softcap`
_GPUS = {f"{_FLASH} 3": (9,), "flash-attn-4": (9, 10, 11, 12), "torch cuDNN": (9, 10)}
_FIXES = {
    "flash_attn": "pip install flash-attn on a CUDA machine, or ",
    "flash_attn_4": "pip install 'mtllm-engine[flash4]' on a CUDA machine, or ",
}


def select(backend: str, device: str, softcap: float = 0.0, width: int = 0) -> Kernel:
    """The op with the one implementation that `model.attention` asks for, which its label names.

    Args:
        backend: auto (what was measured to be the fastest on this GPU at this width, see
            measured.py; else FlashAttention 2, which is in torch), torch (FlashAttention, the 3
            where its package is installed and the GPU is one of its), cudnn, flash_attn and
            flash_attn_4 (those packages), reference (plain PyTorch).
        device: cpu or cuda.
        softcap: What the op will be called with; 0 is none, and then it need not be.
        width: Of a head.

    Raises:
        ValueError: There is no such backend, it is not for the device, it is not installed, or it
            has no soft cap.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            f"unknown model.attention: {backend!r}; choose one of {', '.join(_BACKENDS)}"
        )
    if backend == "auto" and softcap:  # which torch's own kernels have not
        able = [name for label, name in _CAPPED.items() if device == "cuda" and _runs(label)]
        backend = able[0] if able else "reference"
    if backend == "reference":
        return dataclasses.replace(attention, implementations={})
    labels = _BACKENDS[backend]
    if backend == "auto" and device == "cuda" and torch.cuda.is_available():
        labels = (*fastest(torch.cuda.get_device_name(), width), *labels)
    missing = []
    for label in labels:
        implementation = attention.implementations[label]
        if implementation.device == device and _suits(label):
            try:
                implementation.function  # noqa: B018 - imports it
                _check_softcap(label, device, softcap)
                return dataclasses.replace(attention, implementations={label: implementation})
            except ImportError as error:
                missing.append(str(error))
    why = "; ".join(missing) or f"it is not for {_here(device)}"
    fix = _FIXES.get(backend, "")
    raise ValueError(f"model.attention = {backend!r}: {why}; {fix}set it to 'auto'")


def _here(device: str) -> str:
    is_gpu = device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if is_gpu else device


def _runs(label: str) -> bool:
    try:
        return _suits(label) and bool(attention.implementations[label].function)
    except ImportError:
        return False


def _check_softcap(label: str, device: str, softcap: float) -> None:
    if softcap and label not in _CAPPED:
        others = _CAPPED.values() if device == "cuda" else ()
        able = " or ".join(map(repr, ("reference", *others)))
        raise ValueError(
            f"model.decoder caps its attention's scores, which {label} cannot do: set "
            f"model.attention to {able}"
        )


def _suits(label: str) -> bool:
    """Whether the GPU is one that it is for; others run wherever their device is."""
    if label not in _GPUS:
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in _GPUS[label]
