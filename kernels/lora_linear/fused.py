"""A frozen linear with LoRA on CUDA: the base GEMM is the library's, the kernels around it ours."""

import torch
from mtllm_engine.kernels.contract import DTYPES, Update, check, check_shape
from torch.autograd.function import once_differentiable

from . import library
from .dropout import Dropout
from .low_rank import (
    MAX_ADAPTERS,
    MAX_RANK,
    Group,
    input_gradients,
    low_activations,
    output_gradients,
    pack,
)
from .quantised import Quantised, input_gradient, product, split
from .update import masked_update, update

Adapters = tuple[tuple[int, torch.Tensor, torch.Tensor], ...]
NOT_TRAINED = (None,) * 6  # gradients of `_LoraLinear`'s arguments between x and the matrices


def lora_linear(
    x_SD: torch.Tensor,
    weight_FD: torch.Tensor | Quantised,
    bias_F: torch.Tensor | None,
    adapters: Adapters = (),
    scale: float = 1.0,
    dropout: Dropout | None = None,
    *,
    deferred: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Update | None]:
    """x W^T + b, plus scale * drop(x) A^T B^T of each adapter into the channels from `start` on.

    The GEMMs with W are the library's; they add themselves to the adapters' update, which lies in
    their output already. Backward keeps x, the low-rank activations and the parameters themselves;
    of masks nothing.

    Args:
        x_SD: fp32, bf16 or fp16, contiguous.
        weight_FD: Like x, or quantised. Frozen; never gets a gradient.
        bias_F: Like x. Frozen.
        adapters: At most MAX_ADAPTERS of (start, lora_A (R, D), lora_B (f, R)), contiguous, all of
            one rank R; rounded to x's dtype where used, gradients are sums in fp32. Above MAX_RANK,
            as in a sum of large adapters, all products are the library's.
        scale: alpha / R.
        dropout: None in evaluation and without dropout.
        deferred: Leave the adapters' update to whoever reads y next, which saves a pass over y:
            returns (x W^T + b, update), of which the latter is None where there is nothing to add.
            The gradient to give back is that of the sum.

    Raises:
        ValueError: An argument is not contiguous, on another device, of a wrong shape or dtype, or
            out of range.

    Source: arXiv 2106.09685, eq. 3.
    """
    check(x_SD, x_SD=x_SD, bias_F=bias_F)
    check_shape((None, None), DTYPES, x_SD=x_SD)
    if not isinstance(weight_FD, Quantised):
        check(x_SD, weight_FD=weight_FD)
        check_shape((None, x_SD.shape[1]), (x_SD.dtype,), weight_FD=weight_FD)
    check_shape(weight_FD.shape[:1], (x_SD.dtype,), bias_F=bias_F)
    group = _check_adapters(x_SD, weight_FD.shape[0], adapters)
    if adapters and dropout is not None:
        _check_dropout(x_SD, dropout, len(adapters))
    if group and group.rank > MAX_RANK:
        options = {"scale": scale, "dropout": dropout, "deferred": deferred}
        return library.lora_linear(x_SD, weight_FD, bias_F, adapters, **options)
    leaves_update = deferred and group is not None
    matrices = [matrix for _, *pair in adapters for matrix in pair]
    y_SF, *left = _LoraLinear.apply(
        x_SD, weight_FD, bias_F, group, scale, dropout, leaves_update, *matrices
    )
    return (y_SF, tuple(left) or None) if deferred else y_SF


def _check_adapters(x_SD: torch.Tensor, out_width: int, adapters: Adapters) -> Group | None:
    if not adapters:
        return None
    if len(adapters) > MAX_ADAPTERS:
        raise ValueError(f"adapters: {len(adapters)}, expected at most {MAX_ADAPTERS} in a group")
    rank = len(adapters[0][1])
    if rank < 1:
        raise ValueError("adapters have rank 0, expected at least 1")
    for i, (start, lora_A_RD, lora_B_fR) in enumerate(adapters):
        names = {f"adapters[{i}].lora_A": lora_A_RD, f"adapters[{i}].lora_B": lora_B_fR}
        check(x_SD, **names)
        for shape, (name, matrix) in zip(((rank, x_SD.shape[1]), (None, rank)), names.items()):
            check_shape(shape, DTYPES, **{name: matrix})
        end = start + len(lora_B_fR)
        if not 0 <= start < end <= out_width:
            raise ValueError(
                f"adapters[{i}] is on channels {start} to {end}, weight_FD has {out_width}"
            )
    starts = tuple(start for start, _, _ in adapters)
    return Group(starts, tuple(start + len(lora_B_fR) for start, _, lora_B_fR in adapters), rank)


def _check_dropout(x_SD: torch.Tensor, dropout: Dropout, num_adapters: int) -> None:
    seeds = {"dropout.seeds_S": dropout.seeds_S}
    check(x_SD, **seeds)
    check_shape(x_SD.shape[:1], (torch.int32,), **seeds)
    if not 0 <= dropout.p < 1:
        raise ValueError(f"dropout.p is {dropout.p}, expected at least 0 and less than 1")
    if len(dropout.linears) != num_adapters:
        raise ValueError(f"dropout.linears are {len(dropout.linears)}, the adapters {num_adapters}")


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, weight_FD, bias_F, group, scale, dropout, leaves_update, *matrices):
        low_SQ = lora_B_FQ = None
        ctx.out_width = weight_FD.shape[0]
        if group is not None:
            lora_A_QD, lora_B_FQ = pack(group, ctx.out_width, scale, matrices, x_SD.dtype)
            low_SQ = low_activations(group, x_SD, lora_A_QD, dropout)
        ctx.quantised, saved_FD = split(weight_FD, needed=ctx.needs_input_grad[0])
        ctx.save_for_backward(None if group is None else x_SD, low_SQ, saved_FD, *matrices)
        ctx.group, ctx.scale, ctx.dropout = group, scale, dropout
        if group is None:
            return (product(x_SD, weight_FD, bias_F),)
        if leaves_update:
            ctx.mark_non_differentiable(low_SQ, lora_B_FQ)
            ctx.set_materialize_grads(False)
            return product(x_SD, weight_FD, bias_F), low_SQ, lora_B_FQ
        if ctx.quantised is not None:
            return (update(low_SQ, lora_B_FQ, bias_F, added_SF=weight_FD.product(x_SD)),)
        return (update(low_SQ, lora_B_FQ, bias_F).addmm_(x_SD, weight_FD.T),)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_SF, *_):
        dy_SF = dy_SF.contiguous()
        x_SD, low_SQ, weight_FD, *matrices = ctx.saved_tensors
        weight_FD = weight_FD if ctx.quantised is None else ctx.quantised
        if ctx.group is None:
            return input_gradient(dy_SF, weight_FD), *NOT_TRAINED
        lora_A_QD, lora_B_FQ = pack(ctx.group, ctx.out_width, ctx.scale, matrices, dy_SF.dtype)
        dlow_SQ, dBs = output_gradients(ctx.group, dy_SF, low_SQ, lora_B_FQ, ctx.scale)
        dAs = input_gradients(ctx.group, x_SD, dlow_SQ, ctx.dropout)
        gradients = [gradient for pair in zip(dAs, dBs) for gradient in pair]
        dx_SD = None
        if weight_FD is not None:
            dx_SD = _input_gradient(ctx, dy_SF, weight_FD, dlow_SQ, lora_A_QD)
        return dx_SD, *NOT_TRAINED, *gradients


def _input_gradient(ctx, dy_SF, weight_FD, dlow_SQ, lora_A_QD):
    """dy W + sum of drop_i(dlow_i A_i), of which the latter is written first."""
    if ctx.dropout is None:
        dx_SD = update(dlow_SQ, lora_A_QD, transposed=True)
    else:
        dx_SD = masked_update(ctx.group, dlow_SQ, lora_A_QD, ctx.dropout)
    if ctx.quantised is not None:
        return dx_SD.add_(weight_FD.input_gradient(dy_SF))
    return dx_SD.addmm_(dy_SF, weight_FD)
