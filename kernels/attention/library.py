"""Packed attention by others' fused kernels: FlashAttention on CUDA, SDPA on the CPU."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import attention

HALVES = (torch.bfloat16, torch.float16)  # what FlashAttention and cuDNN have kernels for
PINNED_FROM = "2.14"  # torches whose varlen_attn takes cuDNN by itself where that can


def attention_varlen(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    flash: Literal["FA3"] | None = None,
) -> torch.Tensor:
    """torch's varlen_attn, with the FlashAttention 2 that is built into it or another.

    The former is for sm_80 and later. cuDNN, which later torches prefer, is kept out: it is
    `attention_cudnn`.

    Args:
        flash: FlashAttention 3 (sm_90), from a package of its own.

    Raises:
        ValueError: q is not in half precision, or the package lacks what torch asks for.
    """
    from torch.nn.attention.varlen import varlen_attn  # slow to import, and of no use without CUDA

    check_dtype(q_SHK)
    _activate(flash)
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    options = {"window_size": window, **grouped(varlen_attn, q_SHK, k_SGK)}
    with _flash_alone():
        return varlen_attn(q_SHK, k_SGK, v_SGK, cu_seqlens, cu_seqlens, longest, longest, **options)


def _flash_alone() -> contextlib.AbstractContextManager:
    """Meanwhile a varlen_attn that chooses between FlashAttention and cuDNN takes the former."""
    if torch.__version__ < PINNED_FROM:
        return contextlib.nullcontext()
    return attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION)


def grouped(varlen_attn: Callable, q_SHK: torch.Tensor, k_SGK: torch.Tensor) -> dict[str, bool]:
    """What tells varlen_attn of grouped queries: later torches than 2.11 want to be told."""
    is_grouped = q_SHK.shape[1] != k_SGK.shape[1]
    return {"enable_gqa": is_grouped} if "enable_gqa" in _parameters(varlen_attn) else {}


_parameters = functools.cache(lambda function: inspect.signature(function).parameters.keys())


attention_fa3 = functools.partial(attention_varlen, flash="FA3")


def attention_flash_attn(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softcap: float = 0.0,
) -> torch.Tensor:
    """FlashAttention 2 of the package flash-attn (sm_80 and later).

    Args:
        softcap: Of the scores, from flash-attn 2.6 on.

    Raises:
        ValueError: q is not in half precision.
    """
    from flash_attn import flash_attn_varlen_func  # not among the project's packages

    check_dtype(q_SHK)
    longest = max(lengths)
    # varlen_attn follows this switch by itself
    options = {"deterministic": torch.are_deterministic_algorithms_enabled(), "causal": causal}
    if softcap:
        options["softcap"] = softcap
    packing = (cu_seqlens, cu_seqlens, longest, longest)
    return flash_attn_varlen_func(q_SHK, k_SGK, v_SGK, *packing, **options)


def attention_flash_attn_4(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softcap: float = 0.0,
) -> torch.Tensor:
    """FlashAttention 4 of the package flash-attn-4 (sm_90 and later), compiled at its first call.

    Not by torch's varlen_attn, which expects what the package's first versions returned.

    Args:
        softcap: Of the scores.

    Raises:
        ValueError: q is not in half precision.
    """
    from flash_attn.cute import flash_attn_varlen_func  # not among the project's packages

    check_dtype(q_SHK)
    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    options = {"causal": causal, "softcap": softcap}
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out_SHK, _ = flash_attn_varlen_func(q_SHK, k_SGK, v_SGK, **ends, **longest, **options)
    return out_SHK


def attention_sdpa(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    """One call of SDPA's kernel for each run of documents of equal length.

    Kept for backward: q, k, v and the output, as they are, and the logarithms of the sums of
    exponentials.

    Not padded, masked by block or nested: with 4 heads of 32 channels, 30 documents of about 40
    tokens and 5 of about 350 on one core, padding gains nothing, nested tensors take 3 to 5 times
    as long and a block mask 3 to 7 times.
    """
    return _Sdpa.apply(q_SHK, k_SGK, v_SGK, lengths, causal)


class _Sdpa(torch.autograd.Function):
    """One node however many runs there are.

    torch's own graph would have a dozen for each, and keep each output twice, in its run and among
    all.
    """

    @staticmethod
    def forward(ctx, q_SHK, k_SGK, v_SGK, lengths, causal):
        out_SHK, sums = torch.empty_like(q_SHK, memory_format=torch.contiguous_format), []
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for out_NHLK, *run in _runs(lengths, out_SHK, q_SHK, k_SGK, v_SGK):
            run_out_NHLK, sums_NHL = forward(*run, 0.0, causal)
            out_NHLK.copy_(run_out_NHLK)
            sums.append(sums_NHL)
        ctx.save_for_backward(q_SHK, k_SGK, v_SGK, out_SHK, *sums)
        ctx.lengths, ctx.causal = lengths, causal
        return out_SHK

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_SHK):
        q_SHK, k_SGK, v_SGK, out_SHK, *sums = ctx.saved_tensors
        inputs = (q_SHK, k_SGK, v_SGK)
        contiguous = {"memory_format": torch.contiguous_format}
        gradients = [torch.empty_like(x, **contiguous) for x in inputs]
        runs = _runs(ctx.lengths, *gradients, dout_SHK, *inputs, out_SHK)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for (dq_NHLK, dk_NGLK, dv_NGLK, *run), sums_NHL in zip(runs, sums, strict=True):
            values = backward(*run, sums_NHL, 0.0, ctx.causal)
            for gradient, value in zip((dq_NHLK, dk_NGLK, dv_NGLK), values, strict=True):
                gradient.copy_(value)
        return *gradients, None, None


def _runs(lengths: tuple[int, ...], *states: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views (N, heads, L, K) of states (S, heads, K), for each run of N equally long documents."""
    runs = [(length, length * len(list(same))) for length, same in itertools.groupby(lengths)]
    parts = [x.transpose(0, 1).split([size for _, size in runs], dim=1) for x in states]
    for (length, _), *run in zip(runs, *parts, strict=True):
        yield tuple(x.unflatten(1, (-1, length)).transpose(0, 1) for x in run)


def check_dtype(q_SHK: torch.Tensor) -> None:
    """Raises: ValueError: q is not in half precision."""
    if q_SHK.dtype not in HALVES:
        raise ValueError(
            f"q_SHK is {q_SHK.dtype}, and fused attention has only bfloat16 and float16: "
            "set model.dtype to one of them, or model.attention to 'reference'"
        )


def _activate(flash: str | None) -> None:
    """Switches varlen_attn, which torch can only do for the whole process."""
    if attention.current_flash_attention_impl() == flash:
        return
    if flash is None:
        attention.restore_flash_attention_impl()
        return
    try:
        attention.activate_flash_attention_impl(flash)
    except RuntimeError as error:  # an early one: forward alone
        fix = "install a later one, or set model.attention to 'auto'"
        raise ValueError(f"{flash}'s package lacks kernels ({error}): {fix}") from error
