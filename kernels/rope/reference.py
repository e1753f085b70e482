import torch


def rope(
    heads_SXK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int
) -> torch.Tensor:
    rotated, rest = heads_SXK[:, :num_rotated].float(), heads_SXK[:, num_rotated:]
    left, right = rotated.chunk(2, dim=-1)
    cos, sin = cos_Sk[:, None], sin_Sk[:, None]
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    return torch.cat([turned.to(heads_SXK.dtype), rest], dim=1)
