"""Adapters that are merged first: the LLM's tensors with those of `model.adapters` added to them
while they are read, and what tells one chain of adapters from another.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mtllm_engine.config import ModelConfig
from mtllm_engine.files import sha256_of
from mtllm_engine.model import peft
from mtllm_engine.model.tensors import TensorFiles, Tensors, check_finite, resolve
from mtllm_engine.model.weights import DECODER_PREFIXES

ROWS = 256  # of a block of B A
LINEAR = r"layers\.\d+\.(?:self_attn|mlp)\.\w+"
ADAPTER = re.compile(
    rf"{re.escape(peft.AROUND)}(?P<linear>(?:{'|'.join(map(re.escape, DECODER_PREFIXES))})"
    rf"(?P<within>{LINEAR}))\.lora_[AB]\.weight"
)
APPLIED = (*peft.APPLIED, *peft.CHOSEN)


def open_decoder(model: ModelConfig) -> Tensors:
    """The LLM's tensors, with `model.adapters` merged into them.

    Raises:
        ValueError: There is no such model or adapter, or one does not fit the LLM, or asks for what
            is not implemented.
    """
    files = TensorFiles(resolve(model.decoder))
    return Merged(files, list(map(find_adapters, model.adapters))) if model.adapters else files


def find_adapters(name: str) -> Path:
    """The folder of one of `model.adapters`.

    Raises:
        ValueError: There is none, or it is another's than PEFT's.
    """
    try:
        folder = resolve(name)
    except ValueError as error:
        raise ValueError(f"model.adapters: {error}") from error
    if (folder / peft.FILE).is_file():
        return folder
    fix = "name a folder, or a hub id, of PEFT's adapters"
    if (folder / "checkpoints").is_dir():
        fix = f"it is a run: name one of its checkpoints, {folder / 'checkpoints' / 'latest'}"
    elif (folder / "config.json").is_file():
        fix = f"it is a model: name it as model.decoder, or {fix}"
    raise ValueError(f"model.adapters: {name!r} has no {peft.FILE}; {fix}")


def chain_fingerprint(adapters: Sequence[str]) -> str:
    """A name for the content of `model.adapters`, in order; "" for none."""
    return " + ".join(map(_fingerprint, map(find_adapters, adapters)))


def _fingerprint(folder: Path) -> str:
    keys = peft.read_saved(folder, APPLIED).keys
    asked = {key: keys[key] for key in sorted(keys) if key not in peft.WITHOUT_INFLUENCE}
    tensors = peft.adapter_tensors(folder).paths
    content = json.dumps([asked, *map(sha256_of, tensors)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one adapter adds to one linear: scale * B A."""

    files: TensorFiles
    linear: str
    """The tensors' name without `.lora_A.weight`."""
    scale: float

    def check(self, shape: tuple[int, ...], rank: int, name: str, folder: Path | str) -> None:
        """Raises: ValueError: A or B is missing, or of another LLM's shape."""
        wanted = {"A": (rank, shape[-1]), "B": (shape[0], rank)}
        for matrix, expected in wanted.items():
            saved = f"{self.linear}.lora_{matrix}.weight"
            theirs = self.files.shape(saved)
            if theirs != expected:
                fits = f"{expected} fits its rank {rank} and {name} {shape} of {folder}"
                raise ValueError(f"{self.files.path(saved)}: {saved} has shape {theirs}; {fits}")

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop), fp32, the same to the last bit on any number of threads.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        rank, width = self.files.shape(f"{self.linear}.lora_A.weight")
        a_RD = self._read("A", 0, rank * width).view(rank, width)
        b_FR = self._read("B", first * rank, stop * rank).view(-1, rank)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return (b_FR @ a_RD).mul_(self.scale)
        finally:
            torch.set_num_threads(threads)

    def _read(self, matrix: str, start: int, stop: int) -> torch.Tensor:
        name = f"{self.linear}.lora_{matrix}.weight"
        values = check_finite(self.files.read(name, start, stop), self.files.folder, name)
        # A copy lies where every allocation does: a product's last bits may depend on that.
        return values.to(torch.float32, copy=True)


class Merged:
    """An LLM's tensors with a chain of adapters added to them, in order, in fp32.

    Args:
        files: The LLM's.
        chain: PEFT's folders.

    Raises:
        ValueError: One has a tensor that is not added to a linear of the LLM's layers, or of
            another shape, or lacks one, or its configuration asks for what is not implemented.
    """

    def __init__(self, files: TensorFiles, chain: Sequence[Path]) -> None:
        self.folder, self.names = files.folder, files.names
        self._files = files
        self._updates: dict[str, list[Update]] = {}
        prefix = _prefix(files)
        linears = _linears(files, prefix)
        for folder in chain:
            for linear, update, rank in _updates(folder, linears):
                name = f"{prefix}{linear}.weight"
                if name not in files.names:
                    where = f"{files.folder} has no {name} that it could be added to"
                    raise ValueError(f"{folder}: {update.linear}: {where}; {peft.MERGE_FIRST}")
                update.check(files.shape(name), rank, name, files.folder)
                self._updates.setdefault(name, []).append(update)

    def path(self, name: str) -> Path:
        return self._files.path(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def adapts(self, linear: str) -> bool:
        return self._files.adapts(linear)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: in fp32 where adapters were added, else
        in the file's dtype. The same bits in whatever slices it is read.

        Raises:
            ValueError: A value of an adapter is NaN or infinite.
        """
        if name not in self._updates:
            return self._files.read(name, start, stop)
        # Blocks are the tensor's, not the slice's: a product of fewer rows has other last bits.
        rows, width = self.shape(name)
        values = torch.empty(stop - start)
        for first in range(start // width // ROWS * ROWS, rows, ROWS):
            last = min(first + ROWS, rows)
            low, high = max(start, first * width), min(stop, last * width)
            if low >= high:
                break
            block = values[low - start : high - start]
            block.copy_(self._files.read(name, low, high))
            for update in self._updates[name]:
                added = update.rows(first, last).view(-1)
                block += added[low - first * width : high - first * width]
        return values


def _updates(folder: Path, linears: Sequence[str]) -> Iterator[tuple[str, Update, int]]:
    """What a folder adds: the linear by its name within the LLM, and the rank that is said of it.

    Args:
        linears: Of the LLM's layers, by their names within it.

    Raises:
        ValueError: A tensor is none of PEFT's on a linear of the LLM's layers, or is there under
            two names, or its configuration is of others; or there is none, or of some linears none.
    """
    saved, files = peft.read_saved(folder, APPLIED), peft.adapter_tensors(folder)
    found: dict[str, str] = {}  # the linear, by its name in the model that it was made on
    for name in files.names:
        if peft.head_of(name):
            continue
        match = ADAPTER.fullmatch(name)
        reason = "it is of no linear of the LLM's layers" if not match else ""
        if match and not saved.targets(match["linear"]):
            reason = f"{saved.path.name} says that this linear has none"
        if reason:
            fix = f"leave it out, or {peft.MERGE_FIRST}"
            raise ValueError(
                f"{files.path(name)}: nothing reads its tensor {name}; {reason}: {fix}"
            )
        if (earlier := found.setdefault(match["within"], match["linear"])) != match["linear"]:
            raise ValueError(
                f"{files.path(name)} has {match['linear']} and {earlier}, which are one"
            )
    if not found:
        lack = "has no adapters of a linear of the LLM: it adds nothing"
        raise ValueError(f"{saved.path.parent} {lack}; leave it out of model.adapters")
    for within, linear in found.items():
        rank, _ = saved.rank_and_alpha(linear)
        update = Update(files=files, linear=peft.AROUND + linear, scale=saved.scale(linear))
        yield within, update, rank
    _check_whole(saved, linears, found)


def _check_whole(saved: peft.Saved, linears: Sequence[str], found: Mapping[str, str]) -> None:
    """Raises: ValueError: A linear that is to have adapters has none in the file."""
    within, linear = next(iter(found.items()))
    place = linear.removesuffix(within)  # of the LLM in the model that they were made on
    for name in linears:
        if name not in found and saved.targets(place + name):
            reason = f"{saved.path.name} says that this linear of the LLM has some"
            fix = "the file was cut, or they are another LLM's: copy them again, or name its own"
            raise ValueError(f"{saved.path.parent} has no adapters of {name}; {reason}: {fix}")


def _prefix(files: TensorFiles) -> str:
    """What stands before the names of an LLM's layers in its files."""
    starts = {name.partition("layers.")[0] for name in files.names if "layers." in name}
    return next((place for place in DECODER_PREFIXES if place in starts), "")


def _linears(files: TensorFiles, prefix: str) -> list[str]:
    """The linears of an LLM's layers, by their names behind the prefix."""
    linear = re.compile(rf"{re.escape(prefix)}({LINEAR})\.weight")
    matches = filter(None, map(linear.fullmatch, files.names))
    return [match[1] for match in matches if len(files.shape(match[0])) == 2]  # and no norm
