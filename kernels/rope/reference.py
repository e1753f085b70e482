import torch


def rope(
    heads_SXK: torch.Tensor, cos_Sk: torch.Tensor, sin_Sk: torch.Tensor, num_rotated: int
) -> torch.Tensor:
    turned_width = 2 * cos_Sk.shape[1]
    rotated, values = heads_SXK[:, :num_rotated].float(), heads_SXK[:, num_rotated:]
    left, right = rotated[..., :turned_width].chunk(2, dim=-1)
    cos, sin = cos_Sk[:, None], sin_Sk[:, None]
    turned = [left * cos - right * sin, right * cos + left * sin, rotated[..., turned_width:]]
    return torch.cat([torch.cat(turned, dim=-1).to(heads_SXK.dtype), values], dim=1)
