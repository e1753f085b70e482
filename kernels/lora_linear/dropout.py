"""Dropout masks as a hash of (token, linear, channel): no RNG state, so recomputation and any sharding agree."""

from dataclasses import dataclass

import torch

MULTIPLIERS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)  # murmur3's, as int32
GOLDEN = 0x9E3779B9 - 2**32


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """`seeds_S` int32: one number per token and step; `linears`: one number per adapted linear of the group."""

    p: float
    seeds_S: torch.Tensor
    linears: tuple[int, ...]


def keep_mask(dropout: Dropout, adapter: int, x_SD: torch.Tensor) -> torch.Tensor:
    """(S, D) in x's dtype: 0 where dropped, 1 / (1 - p) elsewhere.

    keep(s, d) = mix(mix(seed_s ^ mix(linear)) + d * golden) mod 2^31 >= p * 2^31, all on 32-bit integers.
    """
    linear = torch.tensor(dropout.linears[adapter], dtype=torch.int32, device=x_SD.device)
    rows_S = mix32(dropout.seeds_S ^ mix32(linear * GOLDEN))
    channels_D = torch.arange(x_SD.shape[1], dtype=torch.int32, device=x_SD.device) * GOLDEN
    hash_SD = mix32(rows_S[:, None] + channels_D) & 0x7FFFFFFF
    keep_SD = hash_SD >= int(dropout.p * 2**31)
    return keep_SD.to(x_SD.dtype) * (1.0 / (1.0 - dropout.p))


def mix32(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finaliser on int32 tensors, whose products wrap and whose shifts must be made logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MULTIPLIERS[0]
    x = (x ^ ((x >> 13) & 0x7FFFF)) * MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)
