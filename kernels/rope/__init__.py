"""rope: rotates channel pairs (k, k + K/2) of queries and keys by position-dependent angles, given as cos and sin.

Source: arXiv 2104.09864, eq. 34; halves instead of neighbours, as in Hugging Face's Llama.
"""

from mtllm_engine.kernels.contract import Kernel

from .reference import rope as reference

rope = Kernel(name="rope", reference=reference)
