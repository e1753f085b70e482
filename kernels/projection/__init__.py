"""projection: LayerNorm(x) W^T + b, from the encoder's last states (before its final norm) to the LLM's width.

weight (D, E) and bias (D,) are fp32 parameters, cast to x's dtype where used; statistics are fp32.
Source: arXiv 2406.12739, section 3.
"""

from mtllm_engine.kernels.contract import Kernel

from .reference import projection as reference

projection = Kernel(name="projection", reference=reference)
