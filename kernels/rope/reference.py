import torch


def rope(x_SHK: torch.Tensor, cos_SK: torch.Tensor, sin_SK: torch.Tensor) -> torch.Tensor:
    left_SHk, right_SHk = x_SHK.chunk(2, dim=-1)
    rotated_SHK = torch.cat([-right_SHk, left_SHk], dim=-1)
    return x_SHK * cos_SK[:, None].to(x_SHK.dtype) + rotated_SHK * sin_SK[:, None].to(x_SHK.dtype)
