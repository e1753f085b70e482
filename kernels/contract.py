"""What a kernel folder offers: one callable, dispatched by device, with its definition beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An op: `reference` defines it; `native` holds what runs instead, by device type, each with its label.

    Calling it dispatches on the device of the first argument. Nothing falls back: a device without a native
    implementation runs the reference, and the run header says so.
    """

    name: str
    reference: Callable[..., Any]
    native: Mapping[str, tuple[str, Callable[..., Any]]] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _, function = self.native.get(x.device.type, ("reference", self.reference))
        return function(x, *args, **kwargs)

    def label(self, device: torch.device) -> str:
        """What runs on a device, for the run header."""
        return self.native.get(device.type, ("reference", None))[0]
