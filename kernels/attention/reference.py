import torch


def attention(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softcap: float = 0.0,
) -> torch.Tensor:
    outputs = []
    group = q_SHK.shape[1] // k_SGK.shape[1]
    wide = torch.promote_types(q_SHK.dtype, torch.float32)
    documents = zip(*(x.split(lengths) for x in (q_SHK, k_SGK, v_SGK)))
    for q_LHK, k_LGK, v_LGK in documents:
        k_LHK, v_LHK = (x.repeat_interleave(group, dim=1).to(wide) for x in (k_LGK, v_LGK))
        scores_HLL = torch.einsum("qhk,thk->hqt", q_LHK.to(wide), k_LHK) * q_LHK.shape[-1] ** -0.5
        if softcap:
            scores_HLL = softcap * torch.tanh(scores_HLL / softcap)
        if causal:
            future_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(1)
            scores_HLL = scores_HLL.masked_fill(future_LL, float("-inf"))
        outputs.append(torch.einsum("hqt,thk->qhk", scores_HLL.softmax(-1), v_LHK).to(q_SHK.dtype))
    return torch.cat(outputs)
