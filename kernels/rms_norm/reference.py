import torch


def rms_norm(
    x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_SD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_SD = x_SD if residual_SD is None else residual_SD + x_SD
    hidden32_SD = hidden_SD.float()
    scaled_SD = hidden32_SD * torch.rsqrt(hidden32_SD.square().mean(-1, keepdim=True) + eps)
    if weight_D.dtype == torch.float32:
        return (scaled_SD * weight_D).to(x_SD.dtype), hidden_SD
    return scaled_SD.to(x_SD.dtype) * weight_D.to(x_SD.dtype), hidden_SD
