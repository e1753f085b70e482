"""swiglu: silu(gate) * up, from one tensor (S, 2F) that holds the gate's channels and then the up-projection's.

Source: arXiv 2002.05202, eq. 5.
"""

from mtllm_engine.kernels.contract import Kernel

from .reference import swiglu as reference

swiglu = Kernel(name="swiglu", reference=reference)
