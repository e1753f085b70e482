"""Frozen weights in 8 or 4 bits.

A linear needs two products of its weight: x W^T in forward, dy W in backward. A quantised weight
stands in the weight's place in `lora_linear`; it is made once, from the full weight, and never
changes. Both products are of the same quantised W, so dy W is the gradient of what was computed.

All numbers of a weight lie in one flat uint8 parameter, its payload: ZeRO-3 spreads, gathers and
releases it as it does any parameter. Codes and scales are views, made where they are used.
"""

import contextlib
import functools
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs that multiply fp8: Ada, then Hopper
FP8_MULTIPLE = 16  # widths that `_scaled_mm` takes on CUDA
BLOCK = 64  # NF4's weights that share a scale, itself 8 bits; 256 of those share an fp32 one
OUTER_BLOCK = 256
GATHERED = {"fp8": 1.0, "nf4": 0.5 + 1 / BLOCK + 4 / (OUTER_BLOCK * BLOCK)}
"""Bytes of a weight's payload, which ZeRO-3 spreads and gathers; scales of rows left out."""
BYTES = {"fp8": 2.0, "nf4": GATHERED["nf4"]}
"""Bytes of a weight that is whole on the GPU: of fp8 there is a transposed copy too."""


class Quantised(ABC):
    """A frozen weight (F, D), as a linear uses it.

    Inputs and results are in the dtype that the weight had.
    """

    shape: torch.Size
    payload: nn.Parameter  # uint8, flat

    @property
    def num_bytes(self) -> int:
        """Held on this rank for as long as the weight lives."""
        return getattr(self.payload, "ds_tensor", self.payload).nbytes + self.other_bytes

    @property
    @abstractmethod
    def other_bytes(self) -> int:
        """Of what is held beside the payload."""

    def _part(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """So many numbers of the payload, from a byte on."""
        part = self.payload[start : start + count * dtype.itemsize]
        return (part.clone() if start % dtype.itemsize else part).view(dtype)

    @abstractmethod
    def product(self, x_SD: torch.Tensor) -> torch.Tensor:
        """x W^T."""

    @abstractmethod
    def input_gradient(self, dy_SF: torch.Tensor) -> torch.Tensor:
        """dy W."""


def product(
    x_SD: torch.Tensor, weight_FD: torch.Tensor | Quantised, bias_F: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b, of a weight held in either way."""
    if not isinstance(weight_FD, Quantised):
        return functional.linear(x_SD, weight_FD, bias_F)
    y_SF = weight_FD.product(x_SD)
    return y_SF if bias_F is None else y_SF.add_(bias_F)


def input_gradient(dy_SF: torch.Tensor, weight_FD: torch.Tensor | Quantised) -> torch.Tensor:
    """dy W, of a weight held in either way."""
    if not isinstance(weight_FD, Quantised):
        return dy_SF @ weight_FD
    return weight_FD.input_gradient(dy_SF)


def split(
    weight_FD: torch.Tensor | Quantised, *, needed: bool
) -> tuple[Quantised | None, torch.Tensor | None]:
    """What is kept for dy W: a quantised weight, which refers to its parameter and to nothing that
    was gathered, or a tensor to save."""
    if not needed:
        return None, None
    return (weight_FD, None) if isinstance(weight_FD, Quantised) else (None, weight_FD)


def quantise(weight_FD: torch.Tensor, kind: str, *, sharded: bool = False) -> Quantised:
    """The weight as it is held.

    Args:
        kind: "fp8" (a byte a weight, for speed) or "nf4" (about half a byte, for memory).
        sharded: The payload will be spread over ranks. Or else fp8 keeps its transpose too.
    """
    return Fp8.quantise(weight_FD, sharded=sharded) if kind == "fp8" else Nf4.quantise(weight_FD)


def _payload(*parts: torch.Tensor) -> nn.Parameter:
    """Their bytes, one after another."""
    flat = [part.reshape(-1).view(torch.uint8) for part in parts]
    return nn.Parameter(torch.cat(flat), requires_grad=False)


def check_available(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Asks whether this machine can hold frozen weights in such a form.

    Raises:
        ValueError: It cannot; the message says what it lacks.
    """
    if kind == "nf4":
        _bitsandbytes()
    if kind == "fp8" and device.type == "cpu":
        weight = Fp8.quantise(torch.ones(FP8_MULTIPLE, FP8_MULTIPLE))
        try:
            weight.product(torch.ones(1, FP8_MULTIPLE))
        except RuntimeError as error:  # 2.11, for one, knows a single scale for all rows here
            raise ValueError(
                f"model.quantization='fp8': torch {torch.__version__} cannot scale rows apart on a "
                "CPU; install torch 2.13, or set model.quantization='none'"
            ) from error
    if kind == "fp8" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < FP8_CAPABILITY:
            gpu = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
            raise ValueError(
                f"model.quantization='fp8': {gpu} has no fp8 units; set model.quantization='none', "
                "or 'nf4' to save memory"
            )
        if dtype != torch.bfloat16:
            raise ValueError(
                "model.quantization='fp8' multiplies into bfloat16 on a GPU; "
                "set model.dtype='bfloat16'"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8(Quantised):
    """W = scale_F Q, Q in e4m3; and Q once more, transposed, where memory is not what counts.

    `_scaled_mm` sums over the last axis of both operands. Activations are quantised where they are
    used, a scale for each token. In y_sf = sum_d x_sd W_fd the weight's scale depends on f, which
    remains: it is applied to the sum. In dx_sd = sum_f dy_sf W_fd the sum runs over f, so that the
    scale must go in before it: dy scale_F is quantised, and multiplied by the bare Q.
    """

    shape: torch.Size
    payload: nn.Parameter  # Q, then scale_F in fp32
    transposed_DF: torch.Tensor | None  # None: made for each product

    @classmethod
    def quantise(cls, weight_FD: torch.Tensor, *, sharded: bool = False) -> "Fp8":
        """Raises: ValueError: A width is none that fp8 products take."""
        if any(width % FP8_MULTIPLE for width in weight_FD.shape):
            widths = " x ".join(map(str, weight_FD.shape))
            raise ValueError(
                f"model.quantization='fp8': a linear of {widths} weights, not multiples of "
                f"{FP8_MULTIPLE}; set model.quantization='none'"
            )
        quantised_FD, scale_F = quantise_rows(weight_FD)
        return cls(
            shape=weight_FD.shape,
            payload=_payload(quantised_FD, scale_F),
            transposed_DF=None if sharded else quantised_FD.T.contiguous(),
        )

    @property
    def weight_FD(self) -> torch.Tensor:
        """Q."""
        return self._part(0, self.shape.numel(), FP8).view(self.shape)

    @property
    def scale_F(self) -> torch.Tensor:
        """fp32."""
        return self._part(self.shape.numel(), self.shape[0], torch.float32)

    @property
    def other_bytes(self) -> int:
        return 0 if self.transposed_DF is None else self.transposed_DF.nbytes

    def product(self, x_SD: torch.Tensor) -> torch.Tensor:
        return _scaled_product(x_SD, self.weight_FD, self.scale_F)

    def input_gradient(self, dy_SF: torch.Tensor) -> torch.Tensor:
        scale_F, transposed_DF = self.scale_F, self.transposed_DF
        if transposed_DF is None:
            transposed_DF = self.weight_FD.T.contiguous()
        ones_D = scale_F.new_ones(self.shape[1])
        return _scaled_product(dy_SF, transposed_DF, ones_D, scale_F)


def quantise_rows(
    x_SD: torch.Tensor, column_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 (S, D), fp32 scale (S,)): x column is about scale times the former. For fp32 and bf16.

    Scales are powers of two, the least that bring a row below e4m3's 448: to scale is exact,
    whatever the dtype, and the one rounding is that to e4m3. A row of zeros, such as an idle rank's
    gradients, stays one.
    """
    if column_D is not None:
        x_SD = x_SD * column_D.to(x_SD.dtype)
    largest_S = torch.linalg.vector_norm(x_SD, torch.inf, dim=1).float().clamp_(min=2.0**-100)
    # 448 = 1.75 * 2^8: a mantissa above 1.75 needs the next power, which is the exponent of
    # x * 2 / 1.75.
    above_S = (largest_S * (8 / 7)).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    scale_S = above_S * 2.0**-8
    return (x_SD * scale_S.reciprocal().to(x_SD.dtype)[:, None]).to(FP8), scale_S


@functools.cache
def _row_quantiser(device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Triton's where `lora_linear` runs Triton: without one the run header says so."""
    if device == "cuda":
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{__package__}.rows").quantise_rows
    return quantise_rows


def _scaled_product(
    x_SI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    column_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x column) (scale weight)^T."""
    quantised_SI, scale_S = _row_quantiser(x_SI.device.type)(x_SI, column_I)
    scales = {"scale_a": scale_S[:, None], "scale_b": scale_O[None, :]}
    return torch._scaled_mm(quantised_SI, weight_OI.T, **scales, out_dtype=x_SI.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nf4(Quantised):
    """bitsandbytes' NF4 with scales of 8 bits, made full for the length of each product.

    Source: arXiv 2305.14314.
    """

    shape: torch.Size
    payload: nn.Parameter
    """Codes of two weights in a byte; blocks' scales in 8 bits; in fp32 the scales of those, and
    their mean, which was taken off them."""
    dtype: torch.dtype  # the full weight's
    table: torch.Tensor  # (256,) fp32, what the 8 bits mean; the same for all weights

    @classmethod
    def quantise(cls, weight_FD: torch.Tensor) -> "Nf4":
        # Flat: bitsandbytes' CPU kernel (0.50.2) takes wrong blocks' scales where BLOCK does not
        # divide D.
        codes, state = _bitsandbytes().functional.quantize_4bit(
            weight_FD.detach().reshape(-1),
            blocksize=BLOCK,
            quant_type="nf4",
            compress_statistics=True,
        )
        outer = state.state2
        return cls(
            shape=weight_FD.shape,
            payload=_payload(codes, state.absmax, outer.absmax, state.offset),
            dtype=weight_FD.dtype,
            table=outer.code,
        )

    @property
    def codes(self) -> torch.Tensor:
        """uint8, (-1, 1) as bitsandbytes has them."""
        return self._part(0, _ceil(self.shape.numel(), 2), torch.uint8)[:, None]

    @property
    def state(self) -> Any:
        """bitsandbytes' QuantState: scales of blocks, and scales of those."""
        count = self.shape.numel()
        blocks, start = _ceil(count, BLOCK), _ceil(count, 2)
        outer = self._part(start + blocks, _ceil(blocks, OUTER_BLOCK) + 1, torch.float32)
        build = _bitsandbytes().functional.QuantState
        return build(
            absmax=self._part(start, blocks, torch.uint8),
            shape=torch.Size([count]),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
            offset=outer[-1],
            state2=build(
                absmax=outer[:-1], code=self.table, blocksize=OUTER_BLOCK, dtype=torch.float32
            ),
        )

    @property
    def other_bytes(self) -> int:
        return self.table.nbytes

    def product(self, x_SD: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_SD, self.full())

    def input_gradient(self, dy_SF: torch.Tensor) -> torch.Tensor:
        return dy_SF @ self.full()

    def full(self) -> torch.Tensor:
        """(F, D), in the dtype that the weight had."""
        return _bitsandbytes().functional.dequantize_4bit(self.codes, self.state).view(self.shape)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _bitsandbytes():
    # It tells of a CPU kernel that it would like to fetch
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"model.quantization='nf4' needs bitsandbytes ({error}); "
            "pip install 'mtllm-engine[quantised]', or set model.quantization='none'"
        ) from error
