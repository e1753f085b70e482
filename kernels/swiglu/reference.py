import functools

import torch
from torch.nn import functional

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


def swiglu(gate_up_SF: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    gate_SF, up_SF = gate_up_SF.float().chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate_SF) * up_SF).to(gate_up_SF.dtype)
