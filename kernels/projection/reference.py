import torch
from torch.nn import functional


def projection(
    x_SE: torch.Tensor,
    norm_weight_E: torch.Tensor,
    norm_bias_E: torch.Tensor,
    eps: float,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> torch.Tensor:
    dtype, norm = x_SE.dtype, (norm_weight_E.float(), norm_bias_E.float())
    normed_SE = functional.layer_norm(x_SE.float(), x_SE.shape[-1:], *norm, eps).to(dtype)
    bias_D = None if bias_D is None else bias_D.to(dtype)
    return functional.linear(normed_SE, weight_DE.to(dtype), bias_D)
