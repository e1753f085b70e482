"""Packed attention by cuDNN, through the two operators that torch itself calls.

Importing this raises ImportError where they are not to be had, or wrong.
"""

import torch
from torch.autograd.function import once_differentiable

from .library import check_dtype

# Before, the packed backward took a head's width for the length of the longest document, and wrote
# past its buffer where a document is longer: pytorch/pytorch#186142.
TORCH = "2.14"
CUDNN = 91800  # as torch.backends.cudnn.version() counts
WIDEST = 128  # with a backward, on sm_90
SHORTEST = 2  # cuDNN has kernels of its own for documents of one token: wrong ones in some versions

if torch.__version__ < TORCH:
    raise ImportError(
        f"torch {torch.__version__} has a wrong backward of cuDNN's packed attention; pip install "
        f"'torch>={TORCH}'"
    )
if torch.cuda.is_available() and (torch.backends.cudnn.version() or 0) < CUDNN:
    found = torch.backends.cudnn.version() or "no"
    raise ImportError(f"{found} cuDNN, and packed attention takes {CUDNN} (9.18) or later")


def attention_cudnn(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    """cuDNN's fused attention (sm_90 and sm_100).

    cuDNN plans anew, on the host, for each number of tokens, of documents and longest document.

    Kept for backward: q, k, v and the output, as they are, and the logarithms of the sums of
    exponentials.

    Raises:
        ValueError: q is not in half precision, or a head is of a width that cuDNN has not.
    """
    check_dtype(q_SHK)
    if q_SHK.shape[-1] % 8 or q_SHK.shape[-1] > WIDEST:
        raise ValueError(
            f"q_SHK has heads of {q_SHK.shape[-1]}, and cuDNN takes multiples of 8 up to "
            f"{WIDEST}: set model.attention to 'torch'"
        )
    longest = max(SHORTEST, *lengths)
    return _Cudnn.apply(q_SHK, k_SGK, v_SGK, cu_seqlens, longest, causal)


class _Cudnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_SHK, k_SGK, v_SGK, cu_seqlens, longest, causal):
        no_bias, keeps_sums, dropout, wants_mask = None, True, 0.0, False
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        options = (keeps_sums, dropout, causal, wants_mask)
        results = torch.ops.aten._cudnn_attention_forward(
            q_SHK, k_SGK, v_SGK, no_bias, *bounds, *options
        )
        out_SHK, sums = results[:2]  # the form of the sums is torch's and cuDNN's own affair
        seed, offset = results[6:8]  # of dropout: handed back unread
        ctx.save_for_backward(q_SHK, k_SGK, v_SGK, out_SHK, sums, seed, offset, cu_seqlens)
        ctx.longest, ctx.causal = longest, causal
        return out_SHK

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_SHK):
        *states_and_sums, seed, offset, cu_seqlens = ctx.saved_tensors
        no_bias, dropout = None, 0.0
        gradients = torch.ops.aten._cudnn_attention_backward(
            dout_SHK.contiguous(),
            *states_and_sums,
            *(seed, offset, no_bias),
            *(cu_seqlens, cu_seqlens, ctx.longest, ctx.longest),
            *(dropout, ctx.causal),
        )
        return *gradients, None, None, None
