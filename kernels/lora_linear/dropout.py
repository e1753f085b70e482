"""Dropout masks as a hash of (token, linear, channel).

There is no RNG state, so recomputation and any sharding agree.
"""

import functools
from dataclasses import dataclass

import torch

MULTIPLIERS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)  # murmur3's, as int32
GOLDEN = 0x9E3779B9 - 2**32
CHUNK = 2**18  # hashes that stay in a core's cache from the first to the last of ten passes


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """`seeds_S` int32, of each token and step; `linears`, of each adapted one of the group."""

    p: float
    seeds_S: torch.Tensor
    linears: tuple[int, ...]

    @property
    def threshold(self) -> int:
        """The least int32 hash that is kept: a share p of all lies below."""
        return int(self.p * 2**32) - 2**31

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


def keep_mask(dropout: Dropout, adapter: int, x_SD: torch.Tensor) -> torch.Tensor:
    """(S, D) in x's dtype: 0 where dropped, 1 / (1 - p) elsewhere."""
    return kept(dropout, adapter, x_SD).to(x_SD.dtype) * dropout.keep_scale


def kept(dropout: Dropout, adapter: int, x_SD: torch.Tensor) -> torch.Tensor:
    """(S, D) bool: scramble(mix(seed_s ^ mix(linear)) + d * golden) >= (p - 1/2) 2^32.

    All on 32-bit integers. The comparison hangs on a hash's high bits, and mix's last step, mix(h)
    = scramble(h) ^ (scramble(h) >> 16), only changes low ones; a GPU spends more time on hashing
    than on reading x.
    """
    num_tokens, width = x_SD.shape
    hashes_S = mix32_(dropout.seeds_S ^ linear_hash(dropout.linears[adapter]))
    channels_D = torch.arange(width, dtype=torch.int32, device=x_SD.device) * GOLDEN
    keep_SD = torch.empty(num_tokens, width, dtype=torch.bool, device=x_SD.device)
    rows = max(1, CHUNK // width) if x_SD.device.type == "cpu" else max(1, num_tokens)
    for start in range(0, num_tokens, rows):
        hash_sD = scramble32_(hashes_S[start : start + rows, None] + channels_D)
        torch.ge(hash_sD, dropout.threshold, out=keep_SD[start : start + rows])
    return keep_SD


@functools.cache
def linear_hash(linear: int) -> int:
    """mix(linear), an int32 computed on the host."""
    return int(mix32_(torch.tensor(linear, dtype=torch.int32) * GOLDEN))


def mix32_(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finaliser, in place."""
    scramble32_(x)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def scramble32_(x: torch.Tensor) -> torch.Tensor:
    """All but its last step, in place on int32, whose products wrap; shifts are made logical."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MULTIPLIERS[0])
    return x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(MULTIPLIERS[1])
