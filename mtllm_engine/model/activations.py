"""What backward keeps of a layer's forward, and what it computes again.

A normed state or a SwiGLU's output is one cheap pass over something that is kept anyway, but as the
input of a linear with adapters it would be kept a second time: half as much again for each layer.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

Recompute = Callable[[], torch.Tensor]


@contextlib.contextmanager
def rebuilt(tensor: torch.Tensor, recompute: Recompute | None, module: nn.Module) -> Iterator[None]:
    """Inside, `module` runs on `tensor`; autograd keeps `recompute` instead of the tensor, or, with
    None, the tensor.

    Backward calls it where it reads the tensor, without gradients; it must return the same
    numbers, bit by bit. The module's parameters are kept as themselves: what autograd keeps beside
    a hook is otherwise a second tensor on the same memory, which ZeRO-3 could then not release
    after the layer.
    """
    recomputes = {_memory_of(parameter): _itself(parameter) for parameter in module.parameters()}
    if recompute:
        recomputes[_memory_of(tensor)] = recompute

    def pack(saved: torch.Tensor) -> torch.Tensor | Recompute:
        return recomputes.get(_memory_of(saved), saved)

    with saved_tensors_hooks(pack, lambda saved: _unpack(saved)):
        yield


def kept(*_: object) -> contextlib.AbstractContextManager[None]:
    """Takes `rebuilt`'s place and lets autograd keep what it wants: under another checkpoint, and
    without gradients.
    """
    return contextlib.nullcontext()


class Shared:
    """What two tensors are recomputed from: computed for the first, handed on to the second and
    forgotten."""

    def __init__(self, recompute: Recompute) -> None:
        self._recompute = recompute
        self._value: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        value, self._value = self._value, None
        if value is None:
            value = self._value = self._recompute()
        return value


@torch.no_grad()
def _unpack(saved: torch.Tensor | Recompute) -> torch.Tensor:
    return saved if isinstance(saved, torch.Tensor) else saved()


def _memory_of(tensor: torch.Tensor) -> tuple:
    """Where in memory a tensor lies, and how: what a saved alias shares with it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _itself(parameter: nn.Parameter) -> Recompute:
    return lambda: parameter
