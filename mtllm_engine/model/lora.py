"""LoRA on frozen, fused linears: one module for q/k/v, one for gate/up, with an adapter per
original linear.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mtllm_engine.config import LoraConfig
from mtllm_engine.kernels.contract import Update
from mtllm_engine.kernels.lora_linear import Dropout, Quantised, lora_linear, quantise


@dataclass(frozen=True, kw_only=True)
class Members:
    """The original linears inside a fused one: names and output widths, in order along the
    output.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    numbers: tuple[int, ...]
    """By which dropout tells them apart, of all of the LLM's."""

    def adapted(self, targets: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
        """(name, start, width, number) of the members that LoRA targets."""
        start = 0
        for name, width, number in zip(self.names, self.widths, self.numbers, strict=True):
            if name in targets:
                yield name, start, width, number
            start += width


class Adapter(nn.Module):
    """lora_A (R, D) and lora_B (f, R) of one linear, fp32; B starts at 0, A as PEFT starts it."""

    def __init__(self, in_width: int, out_width: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_width))
        self.lora_B = nn.Parameter(torch.empty(out_width, rank))
        self.frozen_A = self.frozen_B = None

    def split(self, rank: int) -> None:
        """From now on the last `rank` of R are parameters of their own, which do not learn."""
        (learning, in_width), out_width = self.lora_A.shape, len(self.lora_B)
        sizes = (learning - rank, rank)
        self.lora_A, self.frozen_A = (nn.Parameter(torch.empty(R, in_width)) for R in sizes)
        self.lora_B, self.frozen_B = (nn.Parameter(torch.empty(out_width, R)) for R in sizes)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A (R, D) and lora_B (f, R) with what does not learn."""
        if self.frozen_A is None:
            return self.lora_A, self.lora_B
        lora_A_RD = torch.cat([self.lora_A, self.frozen_A])
        return lora_A_RD, torch.cat([self.lora_B, self.frozen_B], dim=1)


class AdapterSet(nn.ModuleDict):
    """The adapters of one fused linear, by the names of its members, and how they are applied."""

    def __init__(self, in_width: int, members: Members, lora: LoraConfig) -> None:
        adapted = list(members.adapted(lora.target_modules))
        adapters = {name: Adapter(in_width, width, lora.rank) for name, _, width, _ in adapted}
        super().__init__(adapters)
        self.starts = tuple(start for _, start, _, _ in adapted)
        self.linears = tuple(number for *_, number in adapted)
        self.scale, self.dropout = lora.scale, lora.dropout

    def matrices(self) -> tuple[tuple[int, torch.Tensor, torch.Tensor], ...]:
        """(start, lora_A, lora_B) of each adapter."""
        return tuple(
            (start, *one.matrices()) for start, one in zip(self.starts, self.values(), strict=True)
        )

    def drop(self, seeds_S: torch.Tensor) -> Dropout | None:
        """The dropout of these tokens; None where there is none."""
        active = self.training and self.dropout > 0
        return Dropout(p=self.dropout, seeds_S=seeds_S, linears=self.linears) if active else None


class LoraLinear(nn.Module):
    """A frozen fused linear with named sets of adapters, each a submodule; `call` says which set
    runs, if any.
    """

    def __init__(
        self,
        in_width: int,
        members: Members,
        sets: Mapping[str, LoraConfig],
        dtype: torch.dtype,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.members, self.in_width = members, in_width
        self.weight: nn.Parameter | Quantised = nn.Parameter(
            torch.empty(sum(members.widths), in_width, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(sum(members.widths), dtype=dtype)) if bias else None
        for name, lora in sets.items():
            self.add(name, lora)

    def add(self, name: str, lora: LoraConfig) -> AdapterSet:
        """One more set, not filled yet."""
        added = AdapterSet(self.in_width, self.members, lora)
        self.add_module(name, added)
        return added

    @torch.no_grad()
    def quantise(self, kind: str, *, sharded: bool) -> None:
        """Holds the weight, once it is filled, as "fp8" or "nf4"; the payload is a parameter then.

        Args:
            sharded: The payload will be spread over ranks.
        """
        weight_FD = self.weight
        del self.weight
        self.weight = quantise(weight_FD, kind, sharded=sharded)
        self.payload = self.weight.payload

    def forward(
        self,
        x_SD: torch.Tensor,
        *,
        adapters: str | None,
        seeds_S: torch.Tensor,
        deferred: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Update | None]:
        """Args:
        adapters: The set that runs; None: the bare linear.
        seeds_S: Dropout's number of each token (int32).
        deferred: What the adapters add may be left to be added: (output, update) then.
        """
        if adapters is None:
            return lora_linear(x_SD, self.weight, self.bias, deferred=deferred)
        chosen: AdapterSet = getattr(self, adapters)
        adapted = chosen.matrices(), chosen.scale, chosen.drop(seeds_S)
        return lora_linear(x_SD, self.weight, self.bias, *adapted, deferred=deferred)


def quantised_weights(module: nn.Module) -> list[Quantised]:
    """A module's weights in 8 or 4 bits, whose payloads are parameters of its linears."""
    linears = (item for item in module.modules() if isinstance(item, LoraLinear))
    return [linear.weight for linear in linears if isinstance(linear.weight, Quantised)]


def initial_adapter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """PEFT's start for `...lora_A` (Kaiming-uniform with a = sqrt 5) and `...lora_B` (0), fp32."""
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
