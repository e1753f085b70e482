"""Spans of packed tokens, checked once on the host, so that no kernel has to ask the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 64  # tokens that one program of a kernel goes through


@dataclass(frozen=True, kw_only=True)
class Spans:
    """P spans [start, end) of one packed stream, in order and disjoint, on the device.

    `chunks_C3` (int32: span, start, end) cuts all tokens, in order, into runs of at most CHUNK that
    belong to one span, or to none (span -1): what the kernels' programs share out, however long or
    short the spans are.
    """

    bounds_P2: torch.Tensor  # int32
    chunks_C3: torch.Tensor  # int32
    num_tokens: int

    def __len__(self) -> int:
        return len(self.bounds_P2)


def build_spans(
    bounds: Sequence[Sequence[int]] | np.ndarray, num_tokens: int, device: torch.device | str
) -> Spans:
    """Checks [start, end) bounds, (P, 2) on the host, and puts them on the device.

    Raises:
        ValueError: A span is empty, out of range, or not behind the one before it; there is none.
    """
    host_P2 = np.asarray(bounds, dtype=np.int64).reshape(-1, 2)
    _check(host_P2, num_tokens)
    host_C3 = _cut(host_P2, num_tokens)
    bounds_P2, chunks_C3 = (
        torch.from_numpy(each.astype(np.int32)).to(device, non_blocking=True)
        for each in (host_P2, host_C3)
    )
    return Spans(bounds_P2=bounds_P2, chunks_C3=chunks_C3, num_tokens=num_tokens)


def _check(bounds_P2: np.ndarray, num_tokens: int) -> None:
    if not len(bounds_P2):
        raise ValueError("spans: there is none")
    starts_P, ends_P = bounds_P2.T
    for name, wrong_P in (
        ("is out of range", (starts_P < 0) | (ends_P > num_tokens)),
        ("is empty", ends_P <= starts_P),
        ("starts before the one before it ends", np.r_[False, starts_P[1:] < ends_P[:-1]]),
    ):
        if wrong_P.any():
            span = int(wrong_P.argmax())
            start, end = bounds_P2[span].tolist()
            raise ValueError(
                f"spans: number {span}, [{start}, {end}) of {num_tokens} tokens, {name}"
            )


def _cut(bounds_P2: np.ndarray, num_tokens: int) -> np.ndarray:
    """The spans and the gaps around them, cut into chunks (C, 3)."""
    edges = np.concatenate([[0], bounds_P2.reshape(-1), [num_tokens]])
    starts, ends = edges[:-1], edges[1:]
    spans = np.full(len(starts), -1)
    spans[1::2] = np.arange(len(bounds_P2))
    counts = -(-(ends - starts) // CHUNK)
    owner = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    chunk_starts = starts[owner] + nth * CHUNK
    return np.stack(
        [spans[owner], chunk_starts, np.minimum(chunk_starts + CHUNK, ends[owner])], axis=1
    )
