import torch


def rms_norm(x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    x32_SD = x_SD.float()
    scaled_SD = x32_SD * torch.rsqrt(x32_SD.square().mean(-1, keepdim=True) + eps)
    return scaled_SD.to(x_SD.dtype) * weight_D.to(x_SD.dtype)
