"""attention: softmax(q k^T / sqrt(K)) v inside each packed document; causal or bidirectional, grouped-query.

q (S, H, K), k and v (S, G, K); `cu_seqlens` int32 (N+1,) on the device and the same lengths on the host.
Source: arXiv 1706.03762, eq. 1; grouped queries arXiv 2305.13245.
"""

from mtllm_engine.kernels.contract import Kernel

from .fused import attention_sdpa, attention_varlen
from .reference import attention as reference

attention = Kernel(
    name="attention",
    reference=reference,
    native={"cpu": ("torch SDPA by document", attention_sdpa), "cuda": ("torch varlen_attn", attention_varlen)},
)
