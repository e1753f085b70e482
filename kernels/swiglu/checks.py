"""What every implementation of swiglu asks of its arguments."""

import torch
from mtllm_engine.kernels.contract import DTYPES, check, check_shape

from .reference import ACTIVATIONS


def check_inputs(gate_up_SF: torch.Tensor, activation: str) -> None:
    """Checks what can be seen without asking the device.

    Raises:
        ValueError: There is no such activation, or the tensor is not contiguous, or of a wrong
            shape or dtype.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    check(gate_up_SF, gate_up_SF=gate_up_SF)
    check_shape((None, None), DTYPES, gate_up_SF=gate_up_SF)
    width = gate_up_SF.shape[1]
    if width % 2:
        raise ValueError(f"gate_up_SF is {width} wide; gate and up, side by side, are even")
