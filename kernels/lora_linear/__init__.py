"""lora_linear: y = x W^T + b + scale * drop(x) A^T B^T, with W and b frozen, for one linear or a fused group of them.

In a group (q/k/v, gate/up) W stacks the members' weights along its output; each adapted member has its own A, B, mask.
Source: arXiv 2106.09685, eq. 3; dropout on the adapter's input as in PEFT.
"""

from mtllm_engine.kernels.contract import Kernel

from .dropout import Dropout
from .fused import lora_linear as torch_gemm
from .reference import lora_linear as reference

__all__ = ["Dropout", "lora_linear"]

lora_linear = Kernel(
    name="lora_linear",
    reference=reference,
    native={"cpu": ("torch GEMMs", torch_gemm), "cuda": ("torch GEMMs", torch_gemm)},
)
