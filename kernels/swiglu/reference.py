import functools

import torch
from mtllm_engine.kernels.contract import Update
from torch.nn import functional

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


def swiglu(
    gate_up_SF: torch.Tensor,
    activation: str = "silu",
    update: Update | None = None,
) -> torch.Tensor:
    sums_SF = gate_up_SF.float()
    if update is not None:
        low_SQ, lora_B_FQ = (each.float() for each in update)
        sums_SF = sums_SF + low_SQ @ lora_B_FQ.T
    gate_SF, up_SF = sums_SF.chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate_SF) * up_SF).to(gate_up_SF.dtype)
