"""Whether an implementation computes what its op's definition says, to within rounding.

Outputs and gradients. In low precision the bound is derived, not guessed: `tolerance` times what
the definition itself, run in that precision, is off from the same definition in fp32 on the same
numbers, plus one unit in the last place of the largest value; 1.5 times that for gradients. Where
results are fp32 (or wider), 1e-5 of the largest value is rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .contract import Kernel, map_tensors, named_tensors

FP32_SLACK = 1e-5
GRADIENTS = 1.5  # times as much tolerance as outputs


class Result(NamedTuple):
    """Outputs by path, and gradients by the path of the argument, see `named_tensors`."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def disagreements(
    kernel: Kernel,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    upstream: dict[str, torch.Tensor] | None = None,
    ulps: int = 1,
) -> list[str]:
    """What in a function's outputs and gradients is not `kernel.reference`'s, in words.

    Args:
        arguments: As `kernel.inputs` makes them; left as they are, even by an implementation that
            works in place.
        upstream: Gradients of outputs by path; by default a random one of each.
        ulps: Allowance in units in the last place, for where rounding is worse than to nearest.
    """
    upstream = random_upstream(kernel.reference, arguments) if upstream is None else upstream
    exact = run(kernel.reference, in_fp32(arguments), in_fp32(upstream))
    rounded = run(kernel.reference, arguments, upstream)
    with poisoned_memory():
        ours = run(function, arguments, upstream)
    problems = []
    for kind, factor in (("outputs", 1.0), ("gradients", GRADIENTS)):
        parts = (getattr(result, kind) for result in (ours, rounded, exact))
        differences = _compare(*parts, factor * kernel.tolerance, ulps)
        problems += [f"{kind} {difference}" for difference in differences]
    return problems


def run(
    function: Callable[..., Any], arguments: dict[str, Any], upstream: dict[str, torch.Tensor]
) -> Result:
    """One forward and backward on copies of the arguments.

    These are no leaves, so that the function may work in place.

    Args:
        upstream: Gradients of outputs by path; other outputs are left out of backward.
    """
    leaves = map_tensors(lambda x: x.detach().clone().requires_grad_(x.requires_grad), arguments)
    copies = map_tensors(lambda x: x.clone() if x.requires_grad else x, leaves)
    outputs = named_tensors(function(**copies))
    wanted = {name: leaf for name, leaf in named_tensors(leaves).items() if leaf.requires_grad}
    if not (upstream and wanted):
        return Result(outputs, {})
    values = torch.autograd.grad(
        [outputs[name] for name in upstream],
        list(wanted.values()),
        list(upstream.values()),
        allow_unused=True,
    )
    gradients = {
        name: torch.zeros_like(wanted[name]) if x is None else x for name, x in zip(wanted, values)
    }
    return Result({name: output.detach() for name, output in outputs.items()}, gradients)


def random_upstream(
    function: Callable[..., Any], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """A random gradient for each output that takes one, always the same for a shape and device."""
    outputs = named_tensors(function(**arguments))
    outputs = {name: x for name, x in outputs.items() if x.requires_grad}
    generators = {x.device: torch.Generator(x.device).manual_seed(1) for x in outputs.values()}
    return {
        name: torch.randn(x.shape, generator=generators[x.device], device=x.device).to(x.dtype)
        for name, x in outputs.items()
    }


def in_fp32(structure: Any) -> Any:
    """The same numbers, where they were in half precision."""

    def widened(x: torch.Tensor) -> torch.Tensor:
        return x.detach().float().requires_grad_(x.requires_grad) if is_half(x) else x

    return map_tensors(widened, structure)


def is_half(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize == 2


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Meanwhile `torch.empty` and its kin give NaN (integers: their largest): a gap shows."""
    mode = torch.get_deterministic_debug_mode()
    is_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill is a part of this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = is_filled


def _compare(ours: dict, rounded: dict, exact: dict, tolerance: float, ulps: int) -> Iterator[str]:
    if ours.keys() != exact.keys():
        yield f"are {list(ours)}, expected {list(exact)}"
        return
    for name, value in ours.items():
        target, dtype = exact[name], rounded[name].dtype
        if value.shape != target.shape or value.dtype != dtype:
            expected = f"{dtype} {tuple(target.shape)}"
            yield f"{name}: {value.dtype} {tuple(value.shape)}, expected {expected}"
            continue
        error, unavoidable = _distance(value, target), _distance(rounded[name], target)
        slack = ulps * torch.finfo(dtype).eps if is_half(value) else FP32_SLACK
        allowed = tolerance * unavoidable + slack * _distance(target, torch.zeros_like(target))
        if not error <= allowed:  # NaN is not either
            eager = f"eager is off by {unavoidable:.3g}"
            yield f"{name}: off by {error:.3g}, allowed {allowed:.3g} ({eager})"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
