"""What every implementation of rope asks of its arguments."""

import sys

import torch
from mtllm_engine.kernels.contract import DTYPES, check, check_shape


def check_inputs(
    heads_SXK: torch.Tensor,
    cos_Sk: torch.Tensor,
    sin_Sk: torch.Tensor,
    num_rotated: int,
    *,
    max_width: int = sys.maxsize,
) -> None:
    """Checks what can be seen without asking the device.

    Raises:
        ValueError: An argument is not contiguous, on another device, of a wrong shape or dtype, or
            out of range.
    """
    check(heads_SXK, heads_SXK=heads_SXK, cos_Sk=cos_Sk, sin_Sk=sin_Sk)
    check_shape((None, None, None), DTYPES, heads_SXK=heads_SXK)
    tokens, num_heads, width = heads_SXK.shape
    if width % 2 or not 0 < width <= max_width:
        raise ValueError(
            f"heads_SXK has heads of width {width}, expected an even one up to {max_width}"
        )
    check_shape((tokens, None), (torch.float32,), cos_Sk=cos_Sk)
    pairs = cos_Sk.shape[1]
    if not 0 < pairs <= width // 2:
        raise ValueError(
            f"cos_Sk is of {pairs} pairs of channels, expected 1 to the {width // 2} of heads_SXK"
        )
    check_shape((tokens, pairs), (torch.float32,), sin_Sk=sin_Sk)
    if not 0 <= num_rotated <= num_heads:
        raise ValueError(
            f"num_rotated is {num_rotated}, expected 0 to the {num_heads} heads of heads_SXK"
        )
