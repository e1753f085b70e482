"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; statistics in fp32.

Source: arXiv 1910.07467, eq. 4; rounding as in Llama (normalised value rounded to x's dtype, then scaled).
"""

from mtllm_engine.kernels.contract import Kernel

from .reference import rms_norm as reference

rms_norm = Kernel(name="rms_norm", reference=reference)
