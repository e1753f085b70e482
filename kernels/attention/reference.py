import torch


def attention(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
) -> torch.Tensor:
    outputs = []
    group = q_SHK.shape[1] // k_SGK.shape[1]
    documents = zip(*(x.split(lengths) for x in (q_SHK, k_SGK, v_SGK)))
    for q_LHK, k_LGK, v_LGK in documents:
        k_LHK, v_LHK = (x.repeat_interleave(group, dim=1).float() for x in (k_LGK, v_LGK))
        scores_HLL = torch.einsum("qhk,thk->hqt", q_LHK.float(), k_LHK) * q_LHK.shape[-1] ** -0.5
        if causal:
            future_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(1)
            scores_HLL = scores_HLL.masked_fill(future_LL, float("-inf"))
        outputs.append(torch.einsum("hqt,thk->qhk", scores_HLL.softmax(-1), v_LHK).to(q_SHK.dtype))
    return torch.cat(outputs)
