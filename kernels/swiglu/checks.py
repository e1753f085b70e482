"""What every implementation of swiglu asks of its arguments."""

import torch
from mtllm_engine.kernels.contract import DTYPES, Update, check, check_shape

from .reference import ACTIVATIONS


def check_inputs(gate_up_SF: torch.Tensor, activation: str, update: Update | None) -> None:
    """Checks what can be seen without asking the device.

    Raises:
        ValueError: There is no such activation, or a tensor is not contiguous, or of a wrong
            shape or dtype.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    check(gate_up_SF, gate_up_SF=gate_up_SF)
    check_shape((None, None), DTYPES, gate_up_SF=gate_up_SF)
    width = gate_up_SF.shape[1]
    if width % 2:
        raise ValueError(f"gate_up_SF is {width} wide; gate and up, side by side, are even")
    if update is not None:
        low_SQ, lora_B_FQ = update
        names = {"update[0]": low_SQ, "update[1]": lora_B_FQ}
        check(gate_up_SF, **names)
        for rows, (name, matrix) in zip(gate_up_SF.shape, names.items()):
            check_shape((rows, low_SQ.shape[-1]), (gate_up_SF.dtype,), **{name: matrix})
