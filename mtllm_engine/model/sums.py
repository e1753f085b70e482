"""Sums of adapters: what several checkpoints add to one LLM, as one set of adapters.

Stage 1's adapters read the encoder, a fine-tuned LLM's know its task. Each is an update
scale * B A of the same frozen linears, so their sum is one, of the summed rank: the A stacked, the
B side by side, each times its scale over that of the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mtllm_engine.config import LINEARS, Config, LoraConfig
from mtllm_engine.model.lora import initial_adapter
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.tensors import TensorFiles, check_finite
from mtllm_engine.model.weights import ADAPTERS, HEAD_FILE, checkpoint_tensors, generator_of


class AdapterSum:
    """The tensors of several checkpoints as if they were one's.

    Args:
        parts: Whose adapters are added up.
        beside: Checkpoints whose projection and head count too, and whose adapters do not.
        scale: Of the sum.
        seed: Of what a part that lacks a linear gets there: A drawn, B = 0. None: A = 0 too, as
            nothing learns.

    Raises:
        ValueError: A part has no adapters, or others than it says, or two have a projection or a
            head.
    """

    def __init__(
        self,
        parts: Sequence[TensorFiles],
        beside: Sequence[TensorFiles] = (),
        *,
        scale: float,
        seed: int | None,
    ) -> None:
        self.scale, self.seed = scale, seed
        self.folder = " + ".join(str(each.folder) for each in (*parts, *beside))
        self._parts = [(files, lora_of(files.folder)) for files in parts]
        self._others: dict[str, TensorFiles] = {}
        for files in (*parts, *beside):
            for name in filter(lambda name: not _is_adapter(name), files.names):
                if earlier := self._others.get(name):
                    what = "head" if files.path(name).name == HEAD_FILE else "projection"
                    both = f"{earlier.folder} and {files.folder} have a {what} each"
                    raise ValueError(f"{both}; a sum has one: remove that file from one of them")
                self._others[name] = files
        adapters = [name for each in self._parts for name in _adapters_of(*each)]
        self.names = [*self._others, *dict.fromkeys(adapters)]

    @property
    def rank(self) -> int:
        return sum(lora.rank for _, lora in self._parts)

    def adapts(self, linear: str) -> bool:
        """Whether some part has adapters of such linears."""
        return any(linear in lora.target_modules for _, lora in self._parts)

    def path(self, name: str) -> Path:
        """A file that a tensor is in."""
        every = [*self._others.values(), *(files for files, _ in self._parts)]
        return next(files for files in every if name in files.names).path(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises: ValueError: No part has such a tensor, or theirs do not fit one another."""
        shape = self._owner(name).shape(name)
        if name in self._others:
            return shape
        across = _across(name)
        for files, lora in self._parts:
            if _linear_of(name) in lora.target_modules:
                theirs = files.shape(name)
                if theirs[across] != shape[across] or theirs[1 - across] != lora.rank:
                    fits = f"rank {lora.rank} and {self._owner(name).folder}"
                    raise ValueError(f"{files.folder}: {name} {theirs} does not fit {fits}")
        return (self.rank, shape[1]) if across else (shape[0], self.rank)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor; adapters in fp32.

        Raises:
            ValueError: One of them is NaN or infinite.
        """
        if name in self._others:
            return self._others[name].read(name, start, stop)
        rows, columns = self.shape(name)
        if _across(name):  # the A follow one another
            pieces, offset = [], 0
            for index, (_, lora) in enumerate(self._parts):
                size = lora.rank * columns
                low, high = max(start - offset, 0), min(stop - offset, size)
                if low < high:
                    pieces.append(self._read(index, name, low, high, columns))
                offset += size
            return torch.cat(pieces) if pieces else torch.empty(0)
        # The B stand side by side: whole rows of each, of which the slice is cut.
        first, last = start // columns, -(-stop // columns)
        sides = [
            self._read(index, name, first * lora.rank, last * lora.rank, rows).view(-1, lora.rank)
            for index, (_, lora) in enumerate(self._parts)
        ]
        return torch.cat(sides, 1).reshape(-1)[start - first * columns : stop - first * columns]

    def beside(self, matrix: torch.Tensor, name: str) -> torch.Tensor:
        """A matrix of what learns, with this sum's own behind it along the rank."""
        across = _across(name)
        shape = [self.rank, self.rank]
        shape[across] = matrix.shape[across]
        is_there = self.adapts(_linear_of(name))
        mine = self.read(name, 0, math.prod(shape)) if is_there else torch.zeros(shape)
        return torch.cat([matrix, mine.view(shape)], 1 - across)

    def _read(self, index: int, name: str, start: int, stop: int, length: int) -> torch.Tensor:
        """Of a part's own matrix, as it counts in the sum. Args: length: of the matrix, along what
        is no rank."""
        files, lora = self._parts[index]
        if _linear_of(name) in lora.target_modules:
            values = check_finite(files.read(name, start, stop), files.folder, name)
            ratio = 1.0 if _across(name) else lora.scale / self.scale
            return (values.double() * ratio).float()
        if self.seed is None or not _across(name):
            return torch.zeros(stop - start)
        generator = generator_of(self.seed, f"{name}/{index}")
        drawn_RD = initial_adapter("lora_A", torch.Size((lora.rank, length)), generator)
        return drawn_RD.reshape(-1)[start:stop]

    def _owner(self, name: str) -> TensorFiles:
        """Who says what shape a tensor has."""
        if name in self._others:
            return self._others[name]
        having = [files for files, lora in self._parts if _linear_of(name) in lora.target_modules]
        if not having:
            raise ValueError(f"{self.folder} have no tensor {name}")
        return having[0]


def open_start(
    config: Config, *, learns: bool
) -> tuple[TensorFiles | AdapterSum | None, AdapterSum | None]:
    """What `model.init_from` gives what is trained, and the adapters beside it that do not learn.

    Args:
        config: As `settle` returns it.

    Raises:
        ValueError: A folder is no checkpoint, or as `AdapterSum`.
    """
    parts = [checkpoint_tensors(folder) for folder in config.model.init_from]
    if len(parts) < 2:
        return next(iter(parts), None), None
    options = {"scale": config.lora.scale, "seed": config.run.seed if learns else None}
    count = 1 if config.lora.train == "first" else len(parts)
    start = AdapterSum(parts[:count], parts[count:], **options)
    if count == len(parts):
        return start, None
    return start, AdapterSum(parts[count:], scale=config.lora.scale, seed=None)


def settle(config: Config) -> Config:
    """The configuration with what its [lora] leaves to a sum's adapters; without a sum, as it is.

    Raises:
        ValueError: A part has no adapters, or [lora] asks for others.
    """
    origins, lora = config.model.init_from, config.lora
    if len(origins) < 2:
        return config
    total = sum_of([lora_of(Path(folder)) for folder in origins])
    for key in ("rank", "target_modules"):
        ours, theirs = getattr(lora, key), getattr(total, key)
        if ours and (set(ours) != set(theirs) if key == "target_modules" else ours != theirs):
            parts = f"{theirs} in the sum of {' and '.join(origins)}"
            raise ValueError(f"lora.{key} is {ours}, and {parts}; set it to that, or leave it out")
    is_stabilised = lora.rslora and lora.alpha
    alpha = lora.alpha or total.alpha
    fields = {"rank": total.rank, "alpha": alpha, "rslora": bool(is_stabilised)}
    targets = lora.target_modules or total.target_modules
    return replace(config, lora=replace(lora, **fields, target_modules=targets))


def sum_of(loras: Sequence[LoraConfig]) -> LoraConfig:
    """The shape of a sum; its scale is the first's, whose B then are as they were. Of one alone, as
    it is."""
    if len(loras) == 1:
        return loras[0]
    rank = sum(lora.rank for lora in loras)
    targets = {name for lora in loras for name in lora.target_modules}
    ordered = tuple(name for name in LINEARS if name in targets)
    return LoraConfig(rank=rank, alpha=loras[0].scale * rank, target_modules=ordered)


def lora_of(folder: Path) -> LoraConfig:
    """Raises: ValueError: The folder has no adapters, or they add nothing, or as `read_lora`."""
    if not (folder / ADAPTERS).is_file():
        raise ValueError(f"{folder} has no {ADAPTERS}: there is nothing to add up")
    lora = read_lora(folder)
    if not lora.alpha:
        raise ValueError(f"{folder}: lora_alpha=0: there is nothing to add up; leave it out")
    return lora


def _adapters_of(files: TensorFiles, lora: LoraConfig) -> list[str]:
    """Raises: ValueError: One is of a linear that has none by the part's own configuration."""
    names = [name for name in files.names if _is_adapter(name)]
    for name in names:
        if _linear_of(name) not in lora.target_modules:
            lack = f"its target_modules lack {_linear_of(name)}"
            raise ValueError(f"{files.path(name)}: nothing reads its tensor {name}; {lack}")
    return names


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _linear_of(name: str) -> str:
    """Such as q_proj."""
    return name.split(".")[-3]


def _across(name: str) -> int:
    """The dimension of a matrix that is no rank: 1 of lora_A (R, D), 0 of lora_B (f, R)."""
    return int(name.endswith(".lora_A.weight"))
