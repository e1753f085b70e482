"""Packed attention by PyTorch's own fused kernels: FlashAttention's varlen on CUDA, SDPA per document on the CPU."""

import torch
from torch.nn import functional


def attention_varlen(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # only CUDA builds have its kernels

    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    grouped = q_SHK.shape[1] != k_SGK.shape[1]
    return varlen_attn(
        q_SHK, k_SGK, v_SGK, cu_seqlens, cu_seqlens, longest, longest, window_size=window, enable_gqa=grouped
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
    q_HSK, k_GSK, v_GSK = (x.transpose(0, 1) for x in (q_SHK, k_SGK, v_SGK))
    grouped = q_SHK.shape[1] != k_SGK.shape[1]
    documents = zip(q_HSK.split(lengths, 1), k_GSK.split(lengths, 1), v_GSK.split(lengths, 1))
    outputs = [
        functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, enable_gqa=grouped)[0]
        for q, k, v in documents
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)
