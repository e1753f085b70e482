"""What every implementation of swiglu asks of its argument."""

import torch
from mtllm_engine.kernels.contract import DTYPES, check, check_shape


def check_inputs(gate_up_SF: torch.Tensor) -> None:
    """Raises: ValueError: The argument is not contiguous, or of a wrong shape or dtype."""
    check(gate_up_SF, gate_up_SF=gate_up_SF)
    check_shape((None, None), DTYPES, gate_up_SF=gate_up_SF)
    if gate_up_SF.shape[1] % 2:
        raise ValueError(f"gate_up_SF is {gate_up_SF.shape[1]} wide, expected an even width: gate and up side by side")
