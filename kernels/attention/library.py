"""Packed attention by others' fused kernels: FlashAttention on CUDA, SDPA over runs of equal documents on the CPU."""

import functools
import itertools
from typing import Literal

import torch
from torch.nn import attention, functional

HALVES = (torch.bfloat16, torch.float16)  # what FlashAttention has kernels for


def attention_varlen(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    flash: Literal["FA3", "FA4"] | None = None,
) -> torch.Tensor:
    """torch's varlen_attn, with the FlashAttention 2 that is built into it (sm_80 and later) or another.

    Args:
        flash: FlashAttention 3 (sm_90) or 4 (sm_90 and sm_100), each from a package of its own.

    Raises:
        ValueError: q is not in half precision.
    """
    from torch.nn.attention.varlen import varlen_attn  # slow to import, and of no use without CUDA

    _check_dtype(q_SHK)
    _activate(flash)
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    grouped = q_SHK.shape[1] != k_SGK.shape[1]
    return varlen_attn(
        q_SHK, k_SGK, v_SGK, cu_seqlens, cu_seqlens, longest, longest, window_size=window, enable_gqa=grouped
    )


attention_fa3 = functools.partial(attention_varlen, flash="FA3")
attention_fa4 = functools.partial(attention_varlen, flash="FA4")


def attention_flash_attn(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    """FlashAttention 2 of the package flash-attn (sm_80 and later).

    Raises:
        ValueError: q is not in half precision.
    """
    from flash_attn import flash_attn_varlen_func  # not among the project's packages

    _check_dtype(q_SHK)
    longest = max(lengths)
    deterministic = torch.are_deterministic_algorithms_enabled()  # varlen_attn follows this switch by itself
    return flash_attn_varlen_func(
        q_SHK, k_SGK, v_SGK, cu_seqlens, cu_seqlens, longest, longest, causal=causal, deterministic=deterministic
    )


def attention_sdpa(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    """One SDPA call for each run of documents of equal length.

    Not padded, masked by block or nested: with 4 heads of 32 channels, 30 documents of about 40 tokens and 5 of about
    350 on one core, padding gains nothing, nested tensors take 3 to 5 times as long and a block mask 3 to 7 times.
    """
    grouped = q_SHK.shape[1] != k_SGK.shape[1]
    runs = [(length, length * len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [size for _, size in runs]
    outputs = []
    for (length, _), *states in zip(runs, q_SHK.split(sizes), k_SGK.split(sizes), v_SGK.split(sizes)):
        q_NHLK, k_NGLK, v_NGLK = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in states)
        out_NHLK = functional.scaled_dot_product_attention(q_NHLK, k_NGLK, v_NGLK, is_causal=causal, enable_gqa=grouped)
        outputs.append(out_NHLK.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _check_dtype(q_SHK: torch.Tensor) -> None:
    if q_SHK.dtype not in HALVES:
        raise ValueError(
            f"q_SHK is {q_SHK.dtype}, and FlashAttention has only bfloat16 and float16: "
            "set model.dtype to one of them, or model.attention to 'reference'"
        )


def _activate(flash: str | None) -> None:
    """Switches varlen_attn, which torch can only do for the whole process."""
    if attention.current_flash_attention_impl() == flash:
        return
    if flash is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(flash)
