"""distill_loss: sum_p weight_p ||s_p - t_p||^2, with s_p and t_p the means of RMSNorm(hidden) over span p.

Spans are int32 (P, 2), [start, end) in the packed tokens, in order and disjoint. Returns the sum (fp32 scalar) and the
pooled student and teacher states (P, D) fp32, from which the metrics follow. The loss of arXiv 2406.12739 (section 3)
is this sum over (D * number of spans in the global batch).
"""

from mtllm_engine.kernels.contract import Kernel

from .reference import distill_loss as reference

distill_loss = Kernel(name="distill_loss", reference=reference)
