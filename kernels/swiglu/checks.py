"""What every implementation of swiglu asks of its argument."""

import torch
from mtllm_engine.kernels.contract import DTYPES, check, check_shape


def check_inputs(gate_up_SF: torch.Tensor) -> None:
    """Checks what can be seen without asking the device.

    Raises:
        ValueError: The argument is not contiguous, or of a wrong shape or dtype.
    """
    check(gate_up_SF, gate_up_SF=gate_up_SF)
    check_shape((None, None), DTYPES, gate_up_SF=gate_up_SF)
    width = gate_up_SF.shape[1]
    if width % 2:
        raise ValueError(f"gate_up_SF is {width} wide; gate and up, side by side, are even")
