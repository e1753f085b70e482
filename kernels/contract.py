"""What a kernel folder offers: an op, its definition, and what one test and one benchmark need.

The definition (`reference`, plain PyTorch) and the implementations take the same arguments and
agree within rounding.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Update = tuple[torch.Tensor, torch.Tensor]
"""(low (S, Q), lora_B (F, Q)) of a linear's adapters: low lora_B^T is still to be added to its
output (S, F)."""


class Cost(NamedTuple):
    """The least that a call must move and compute: what the roofline is drawn with."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Implementation:
    """A function that does what the reference says, imported when first needed.

    Neither Triton nor a C++ compiler is everywhere: then the import raises ImportError. `location`
    is `module:function` inside `mtllm_engine.kernels`; `package` a module that must be importable
    too, of a package that the project does not install. `has_run`: on such a device, and passed its
    tests there; if not, the label says so.
    """

    device: Literal["cpu", "cuda"]
    source: Literal["triton", "c++", "torch", "package"]
    location: str
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    has_run: bool = True

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        if self.package:
            importlib.import_module(self.package)
        module, _, name = self.location.partition(":")
        return getattr(importlib.import_module(f"mtllm_engine.kernels.{module}"), name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """An op: a call runs the first implementation for its argument's device, else the reference.

    Nothing falls back silently: the run header shows `label` for every op.
    """

    name: str
    reference: Callable[..., Any]
    # By label, best first
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    # (generator, dtype, **case) -> keyword arguments, some of which require gradients
    inputs: Callable[..., dict[str, Any]]
    cases: tuple[dict[str, Any], ...]  # small and odd, for tests
    shapes: tuple[dict[str, Any], ...]  # Llama-3-8B and NLLB-600M, for benchmarks
    cost: Callable[..., tuple[Cost, Cost]]  # (dtype, **case) -> of forward, of backward
    # Times eager's own rounding error against fp32, in low precision; for gradients 1.5 x that
    tolerance: float = 2.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._choice(args[0].device.type)[1](*args, **kwargs)

    def label(self, device: str) -> str:
        """What runs on a device type, for the run header, and why nothing better does."""
        label, _, notes = self._choice(device)
        return f"{label} ({'; '.join(notes)})" if notes else label

    @functools.cache  # noqa: B019 - kernels live as long as the process
    def _choice(self, device: str) -> tuple[str, Callable[..., Any], list[str]]:
        notes = []
        for label, implementation in self.implementations.items():
            if implementation.device == device:
                try:
                    function = implementation.function
                except ImportError as error:
                    notes.append(f"no {label}: {error}")
                else:
                    untried = [] if implementation.has_run else ["not yet run by its authors"]
                    return label, function, notes + untried
        return "reference", self.reference, notes


def randn(
    generator: torch.Generator, dtype: torch.dtype, *shape: int, grad: bool = False
) -> torch.Tensor:
    """Normal numbers on the generator's device: the same in every dtype, but for rounding."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(dtype).requires_grad_(grad)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same dicts, tuples and dataclasses, with the function's results for the tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = (map_tensors(function, item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if dataclasses.is_dataclass(value):
        names = (each.name for each in dataclasses.fields(value))
        return dataclasses.replace(
            value, **{name: map_tensors(function, getattr(value, name)) for name in names}
        )
    return value


def named_tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors in such a structure by their path in it: `adapters.0.1`."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, tuple):
        value = dict(zip(getattr(value, "_fields", range(len(value))), value))
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.items() if isinstance(value, dict) else ()
    parts = [named_tensors(item, f"{name}.{key}" if name else str(key)) for key, item in items]
    return {path: tensor for part in parts for path, tensor in part.items()}


def shrink(shape: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A shape of about as many tokens at most, as wide as before; pairs of lengths stay pairs."""
    small = dict(shape)
    if "tokens" in shape:
        small["tokens"] = min(shape["tokens"], tokens)
    for name in {"lengths", "student", "teacher"} & shape.keys():
        count = max(1, tokens // max(shape[name]))
        small[name] = tuple(min(length, tokens) for length in shape[name][:count])
    return small


def check(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Asks of tensors that they are contiguous and on the device of `like`.

    Raises:
        ValueError: One is not, and is named by its keyword.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the other arguments are on {like.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")


def check_shape(
    shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], **tensors: torch.Tensor | None
) -> None:
    """Asks of tensors that they have this shape (None: any size) and one of the dtypes.

    Raises:
        ValueError: One has not, and is named by its keyword.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        differs = [wanted not in (None, size) for size, wanted in zip(tensor.shape, shape)]
        if tensor.dim() != len(shape) or any(differs):
            expected = str(tuple(shape)).replace("None", "any")
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {expected}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
