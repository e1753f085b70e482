"""A frozen linear with LoRA that keeps for backward only its input and the low-rank activations.

The GEMMs are the library's (oneDNN, cuBLAS); what is ours is what is saved: the weight as the
Parameter itself, which ZeRO-3 may release after the layer and gather again for backward, and
dropout masks not at all: they are hashed anew.
"""

import torch
from torch.autograd.function import once_differentiable

from .dropout import Dropout, kept
from .quantised import Quantised, input_gradient, product, split


def lora_linear(
    x_SD: torch.Tensor,
    weight_FD: torch.Tensor | Quantised,
    bias_F: torch.Tensor | None,
    adapters: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = (),
    scale: float = 1.0,
    dropout: Dropout | None = None,
    *,
    deferred: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, None]:
    """x W^T + b, plus scale * drop(x) A^T B^T of each adapter into the channels from `start` on.

    Args:
        x_SD: Compute dtype.
        weight_FD: Frozen; never gets a gradient.
        bias_F: Frozen.
        adapters: (start, lora_A (R, D), lora_B (f, R)) with fp32 parameters, cast to x's dtype
            where used.
        scale: alpha / R.
        dropout: None in evaluation and without dropout.
        deferred: Whether an update may be left to the caller; here none is: (y, None).
    """
    starts = tuple(start for start, _, _ in adapters)
    matrices = [matrix for _, *pair in adapters for matrix in pair]
    y_SF = _LoraLinear.apply(x_SD, weight_FD, bias_F, starts, scale, dropout, *matrices)
    return (y_SF, None) if deferred else y_SF


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, weight_FD, bias_F, starts, scale, dropout, *matrices):
        y_SF = product(x_SD, weight_FD, bias_F)
        lows = []
        for i, start in enumerate(starts):
            lora_A_RD, lora_B_fR = (each.to(x_SD.dtype) for each in matrices[2 * i : 2 * i + 2])
            low_SR = _drop(x_SD, _kept(x_SD, dropout, i)) @ lora_A_RD.T
            low_SR *= 1.0 if dropout is None else dropout.keep_scale
            y_Sf = y_SF[:, start : start + len(lora_B_fR)]
            y_Sf.addmm_(low_SR, lora_B_fR.T, alpha=scale)
            lows.append(low_SR)
        ctx.quantised, saved_FD = split(weight_FD, needed=ctx.needs_input_grad[0])
        ctx.save_for_backward(x_SD if matrices else None, saved_FD, *matrices, *lows)
        ctx.starts, ctx.scale, ctx.dropout = starts, scale, dropout
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF):
        x_SD, weight_FD, *rest = ctx.saved_tensors
        weight_FD = weight_FD if ctx.quantised is None else ctx.quantised
        num, keep_scale = len(ctx.starts), 1.0 if ctx.dropout is None else ctx.dropout.keep_scale
        dx_SD = None if weight_FD is None else input_gradient(dy_SF, weight_FD)
        gradients = []
        for i, start in enumerate(ctx.starts):
            lora_A_RD, lora_B_fR, low_SR = rest[2 * i], rest[2 * i + 1], rest[2 * num + i]
            dy_Sf = dy_SF[:, start : start + len(lora_B_fR)]
            dlow_SR = (dy_Sf @ lora_B_fR.to(dy_Sf.dtype)) * (ctx.scale * keep_scale)
            keep_SD = _kept(x_SD, ctx.dropout, i)
            gradients.append((dlow_SR.T @ _drop(x_SD, keep_SD)).to(lora_A_RD.dtype))
            gradients.append((dy_Sf.T @ low_SR).to(lora_B_fR.dtype) * ctx.scale)
            if dx_SD is not None:
                _add_product(dx_SD, dlow_SR, lora_A_RD.to(dy_Sf.dtype), keep_SD)
        return dx_SD, None, None, None, None, None, *gradients


def _kept(x_SD: torch.Tensor, dropout: Dropout | None, adapter: int) -> torch.Tensor | None:
    return None if dropout is None else kept(dropout, adapter, x_SD)


def _drop(x_SD: torch.Tensor, keep_SD: torch.Tensor | None) -> torch.Tensor:
    """What is kept, unscaled: 1 / (1 - p) is left to the low-rank side, which has fewer values."""
    return x_SD if keep_SD is None else x_SD * keep_SD


def _add_product(
    dx_SD: torch.Tensor,
    dlow_SR: torch.Tensor,
    lora_A_RD: torch.Tensor,
    keep_SD: torch.Tensor | None,
) -> None:
    """Adds what is kept of dlow A, without a dropout in the product's own sums."""
    if keep_SD is None:
        dx_SD.addmm_(dlow_SR, lora_A_RD)
    else:
        dx_SD.addcmul_(dlow_SR @ lora_A_RD, keep_SD)
