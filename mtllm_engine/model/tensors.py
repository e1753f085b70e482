"""A model's files on disk: which there are, and their tensors as memory maps, read by slices."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from mtllm_engine.files import sha256_of

FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.model")
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.model")
FLOATS = {"F64", "F32", "BF16", "F16"}  # by safetensors' names
FLOATS |= {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Tensors(Protocol):
    """Named tensors, read slice by slice: a folder's (`TensorFiles`), or a sum of several's."""

    folder: Path | str
    names: list[str]

    def path(self, name: str) -> Path: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def adapts(self, linear: str) -> bool: ...


class TensorFiles:
    """The tensors of a folder.

    Args:
        files: By default those of a Hugging Face model: `model.safetensors`, its sharded form, or
            `pytorch_model.bin`.
        rename: Our name of a tensor, by the file's.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path] | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        self.folder = folder
        self.paths = list(_weight_files(folder) if files is None else files)
        self._files: dict[str, tuple[Path, str]] = {}
        for path in self.paths:
            for theirs in _tensor_names(path):
                name = rename(theirs)
                if files and name in self._files:
                    earlier = self._files[name][0]
                    raise ValueError(f"{path} has the tensor {name}, and so has {earlier}")
                self._files[name] = (path, theirs)
        self._open: dict[Path, Mapping] = {}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name][0]

    def adapts(self, linear: str) -> bool:
        """Whether linears of a name get their adapters from here: of one checkpoint, all do."""
        return True

    def check(self, name: str) -> None:
        """Raises: ValueError: There is no such tensor, or none of plain floats."""
        self._tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises: ValueError: There is no such tensor, or none of plain floats."""
        tensor = self._tensor(name)
        return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, in the file's dtype; touches only the
        rows they lie in.
        """
        tensor, shape = self._tensor(name), self.shape(name)
        if not hasattr(tensor, "get_shape"):
            return tensor.reshape(-1)[start:stop]
        row = math.prod(shape[1:])
        first = start // row
        rows = tensor[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _tensor(self, name: str):
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        path, theirs = self._files[name]
        if path not in self._open:
            self._open[path] = _open(path)
        opened = self._open[path]
        tensor = opened[theirs] if isinstance(opened, dict) else opened.get_slice(theirs)
        # What is packed or scaled by another tensor would be taken for the numbers themselves.
        dtype = tensor.get_dtype() if hasattr(tensor, "get_dtype") else tensor.dtype
        if dtype not in FLOATS:
            takes = "this takes float32, float64, bfloat16 or float16"
            raise ValueError(f"{path}: {name} has the dtype {dtype}; {takes}")
        return tensor


def check_finite(values: torch.Tensor, folder: Path, name: str) -> torch.Tensor:
    """The values of a folder's tensor as they are. Raises: ValueError: One is NaN or infinite."""
    # Both ends are NaN where a value is; `isfinite` would take sixty times as long.
    if not all(math.isfinite(value) for value in torch.aminmax(values)):
        fix = "the file is damaged, or training it failed"
        raise ValueError(f"{folder}: {name} has values that are NaN or infinite; {fix}")
    return values


def resolve(name: str, files: Sequence[str] = FILES) -> Path:
    """A folder as it is, or a hub id's snapshot, downloaded if need be.

    Args:
        files: Patterns of those that are fetched.

    Raises:
        ValueError: Neither exists.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # only here is a network wanted

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client raises a dozen unrelated types
        kind = type(error).__name__
        raise ValueError(
            f"{name} is neither a folder nor a model the hub gives ({kind})"
        ) from error


def fingerprint(folder: Path) -> str:
    """A name for a checkpoint's content, that is its configuration, tokenizer and weights: reads
    every byte, on several cores.
    """
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:
        for sha256 in pool.map(sha256_of, [*_weight_files(folder), *tokenizer_files(folder)]):
            digest.update(sha256.encode())
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """What a checkpoint's tokenizer is read from."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})


def _weight_files(folder: Path) -> list[Path]:
    # In transformers' order: an index beside a single file is an older one.
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / index} cannot be read: {error}") from error
            files = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index} names")
            return files
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _tensor_names(path: Path) -> list[str]:
    return list(_open(path).keys())


def _open(path: Path):
    """The file's tensors by name, memory-mapped."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # each library has its own types for a cut or damaged file
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
