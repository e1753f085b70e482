import torch
from torch.nn import functional

from .dropout import Dropout, keep_mask


def lora_linear(
    x_SD: torch.Tensor,
    weight_FD: torch.Tensor,
    bias_F: torch.Tensor | None,
    adapters: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = (),
    scale: float = 1.0,
    dropout: Dropout | None = None,
    *,
    deferred: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, None]:
    y_SF = functional.linear(x_SD, weight_FD, bias_F)
    for i, (start, lora_A_RD, lora_B_fR) in enumerate(adapters):
        kept_SD = x_SD if dropout is None else x_SD * keep_mask(dropout, i, x_SD)
        low_SR = functional.linear(kept_SD, lora_A_RD.to(x_SD.dtype))
        update_Sf = scale * functional.linear(low_SR, lora_B_fR.to(x_SD.dtype))
        y_SF = y_SF + functional.pad(update_Sf, (start, y_SF.shape[1] - start - update_Sf.shape[1]))
    return (y_SF, None) if deferred else y_SF
