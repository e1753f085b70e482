"""What every implementation of rms_norm asks of its arguments."""

import sys

import torch
from mtllm_engine.kernels.contract import DTYPES, check, check_shape


def check_inputs(
    x_SD: torch.Tensor,
    weight_D: torch.Tensor,
    residual_SD: torch.Tensor | None,
    *,
    max_width: int = sys.maxsize,
) -> None:
    """Checks what can be seen without asking the device.

    Raises:
        ValueError: An argument is not contiguous, on another device, or of a wrong shape or dtype.
    """
    check(x_SD, x_SD=x_SD, weight_D=weight_D, residual_SD=residual_SD)
    check_shape((None, None), DTYPES, x_SD=x_SD)
    check_shape(x_SD.shape[1:], DTYPES, weight_D=weight_D)
    check_shape(x_SD.shape, (x_SD.dtype,), residual_SD=residual_SD)
    if not 0 < x_SD.shape[1] <= max_width:
        raise ValueError(f"x_SD is {x_SD.shape[1]} wide, expected 1 to {max_width}")
