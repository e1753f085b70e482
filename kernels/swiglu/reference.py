import torch
from torch.nn import functional


def swiglu(gate_up_SF: torch.Tensor) -> torch.Tensor:
    gate_SF, up_SF = gate_up_SF.float().chunk(2, dim=-1)
    return (functional.silu(gate_SF) * up_SF).to(gate_up_SF.dtype)
