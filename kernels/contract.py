"""What a kernel folder offers: one callable, its definition, and all that a generic test and benchmark need.

The definition (`reference`, plain PyTorch) and the implementations take the same arguments and agree within rounding.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Cost(NamedTuple):
    """The least that a call must move and compute: what the roofline is drawn with."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Implementation:
    """A function that does what the reference says; imported when first needed, for neither Triton nor a C++ compiler
    is everywhere: then the import raises ImportError.

    `location` is `module:function` inside `mtllm_engine.kernels`.
    """

    device: Literal["cpu", "cuda"]
    source: Literal["triton", "c++", "torch", "package"]
    location: str

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.location.partition(":")
        return getattr(importlib.import_module(f"mtllm_engine.kernels.{module}"), name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """An op. Calling it runs the first implementation for the first argument's device, else the reference.

    Nothing falls back silently: the run header shows `label` for every op.
    """

    name: str
    reference: Callable[..., Any]
    implementations: Mapping[str, Implementation] = field(default_factory=dict)  # by label, best first
    inputs: Callable[..., dict[str, Any]]  # (generator, dtype, **case) -> keyword arguments, some requiring gradients
    cases: tuple[dict[str, Any], ...]  # small and odd, for tests
    shapes: tuple[dict[str, Any], ...]  # Llama-3-8B and NLLB-600M, for benchmarks
    cost: Callable[..., tuple[Cost, Cost]]  # (dtype, **case) -> of forward, of backward
    tolerance: float = 2.0  # times eager's own rounding error against fp32, in low precision; gradients 1.5 x that

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._choice(args[0].device.type)[1](*args, **kwargs)

    def label(self, device: str) -> str:
        """What runs on a device type, for the run header, and why nothing better does."""
        label, _, missing = self._choice(device)
        return f"{label} ({'; '.join(missing)})" if missing else label

    @functools.cache  # noqa: B019 - kernels live as long as the process
    def _choice(self, device: str) -> tuple[str, Callable[..., Any], list[str]]:
        missing = []
        for label, implementation in self.implementations.items():
            if implementation.device == device:
                try:
                    return label, implementation.function, missing
                except ImportError as error:
                    missing.append(f"no {label}: {error}")
        return "reference", self.reference, missing


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int, grad: bool = False) -> torch.Tensor:
    """Normal numbers on the generator's device, of which `dtype` is a rounding: the same values in every dtype."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(dtype).requires_grad_(grad)


def check(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises: ValueError: A tensor, named by its keyword, is not contiguous, or not on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {like.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
