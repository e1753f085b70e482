"""Safetensors files written piece by piece: no tensor is ever held whole."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from mtllm_engine import files
from mtllm_engine.config import LoraConfig
from mtllm_engine.model.tensors import Tensors, check_finite

PIECE = 1 << 24
"""Elements read at once."""
SHARD_BYTES = 5_000_000_000
NAMES = {  # by safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
FORMAT = {"format": "pt"}  # as transformers and PEFT mark their files


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[torch.Tensor]]
    """Its elements in order, in pieces of any shape and dtype."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def planned(tensors: Tensors, name: str, *, dtype: torch.dtype | None, to: str = "") -> Planned:
    """A tensor as it is stored. Args: dtype: None: the stored one. to: another name for it."""
    shape = tensors.shape(name)
    stored = tensors.read(name, 0, 1).dtype

    def read() -> Iterator[torch.Tensor]:
        for start, stop in _pieces(math.prod(shape), PIECE):
            piece = tensors.read(name, start, stop)
            yield check_finite(piece, tensors.folder, name)

    return Planned(to or name, dtype or stored, shape, read)


def merged(weight: Planned, adapters: Tensors, saved: str, lora: LoraConfig) -> Planned:
    """A linear's weight with its adapters' product added to it in fp32, block by block of rows.

    Args:
        weight: As `planned` by the linear's own tensors.
        saved: The adapters' name, without `.lora_A.weight`.
    """
    width = weight.shape[1]

    def read() -> Iterator[torch.Tensor]:
        a_RD, b_FR = (
            adapters.read(name, 0, math.prod(adapters.shape(name))).view(adapters.shape(name))
            for name in (f"{saved}.lora_A.weight", f"{saved}.lora_B.weight")
        )
        row = 0
        for piece in _rows(weight.read(), width):
            block_FD = piece.view(-1, width).float()
            product_FD = b_FR[row : row + len(block_FD)].float() @ a_RD.float()
            yield block_FD.add_(product_FD, alpha=lora.scale)
            row += len(block_FD)

    return weight._replace(read=read)


def write_safetensors(path: Path, tensors: Iterable[Planned]) -> None:
    """Writes tensors to a file, or, where that would be too large, to files beside it of
    transformers' names (`model-00001-of-00002.safetensors`) and an index.
    """
    # The widest first: each then begins where its elements may.
    ordered = sorted(tensors, key=lambda each: -each.dtype.itemsize)
    shards = list(_shards(ordered))
    if len(shards) == 1:
        _write(path, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        _write(path.with_name(name), shard)
        weight_map |= {each.name: name for each in shard}
    total = {"total_size": sum(each.bytes for each in ordered)}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    files.write_text(path.with_name(f"{path.name}.index.json"), json.dumps(index, indent=1))


def _shards(tensors: Sequence[Planned]) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for each in tensors:
        if shard and sum(item.bytes for item in shard) + each.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(each)
    yield shard


def _write(path: Path, tensors: Sequence[Planned]) -> None:
    header: dict[str, dict] = {"__metadata__": FORMAT}
    offset = 0
    for each in tensors:
        about = {"dtype": NAMES[each.dtype], "shape": each.shape}
        header[each.name] = about | {"data_offsets": [offset, offset + each.bytes]}
        offset += each.bytes
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for each in tensors:
            _write_tensor(file, each)
        files.sync(file)


def _write_tensor(file: BinaryIO, tensor: Planned) -> None:
    end = file.tell() + tensor.bytes
    for piece in tensor.read():
        file.write(piece.to(tensor.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
    assert file.tell() == end, f"{tensor.name} has other elements than its shape says"


def _rows(pieces: Iterable[torch.Tensor], width: int) -> Iterator[torch.Tensor]:
    """Flat pieces of a matrix, cut again at the ends of rows."""
    rest = torch.empty(0)
    for piece in pieces:
        joined = torch.cat([rest.to(piece.dtype), piece]) if len(rest) else piece
        whole = len(joined) // width * width
        rest = joined[whole:]
        if whole:
            yield joined[:whole]


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
