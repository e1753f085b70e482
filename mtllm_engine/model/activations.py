"""What backward keeps of a layer's forward, and what it computes again.

A normed state or a SwiGLU's output is one cheap pass over something that is kept anyway, but as the input of a linear
with adapters it would be kept a second time: half as much again for each layer.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

Recipe = Callable[[], torch.Tensor]


@contextlib.contextmanager
def rebuilt(tensor: torch.Tensor, recipe: Recipe, module: nn.Module) -> Iterator[None]:
    """Inside, `module` runs on `tensor`; autograd keeps the recipe instead of the tensor.

    Backward runs the recipe where it reads the tensor, without gradients; it must return the same numbers, bit by bit.
    The module's parameters are kept as themselves: what autograd keeps beside a hook is otherwise a second tensor on
    the same memory, which ZeRO-3 could then not release after the layer.
    """
    recipes = {_place(parameter): _itself(parameter) for parameter in module.parameters()}
    recipes[_place(tensor)] = recipe

    def pack(saved: torch.Tensor) -> torch.Tensor | Recipe:
        return recipes.get(_place(saved), saved)

    with saved_tensors_hooks(pack, lambda saved: _unpack(saved)):
        yield


def kept(*_: object) -> contextlib.AbstractContextManager[None]:
    """Takes `rebuilt`'s place and lets autograd keep what it wants: under another checkpoint, and without gradients."""
    return contextlib.nullcontext()


class Shared:
    """A recipe that two tensors' recipes need: computed for the first, handed on to the second and forgotten."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        made, self._made = self._made, None
        if made is None:
            made = self._made = self._recipe()
        return made


@torch.no_grad()
def _unpack(saved: torch.Tensor | Recipe) -> torch.Tensor:
    return saved if isinstance(saved, torch.Tensor) else saved()


def _place(tensor: torch.Tensor) -> tuple:
    """Where in memory a tensor lies, and how: what a saved alias shares with it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _itself(parameter: nn.Parameter) -> Recipe:
    return lambda: parameter
