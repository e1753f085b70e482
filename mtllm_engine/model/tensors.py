"""A model's files on disk: which there are, and their tensors as memory maps, read by slices."""

import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from mtllm_engine.files import check_pulled, sha256_of
from mtllm_engine.model import hub

VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt")  # of tokenizers without tokenizer.json
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.model")
# Names of an embedding, and of what may stand for it where the two are one tensor.
TIED = (("model.embed_tokens.weight", "embed_tokens.weight"), ("lm_head.weight",))
TIED_WITH_IMAGES = (
    ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
)
TIED_PAIR = (
    ("model.shared.weight", "model.encoder.embed_tokens.weight", "shared.weight")
    + ("encoder.embed_tokens.weight", "embed_tokens.weight"),
    ("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
)
ADAPTER_CONFIG = "adapter_config.json"
_FOREIGN = re.compile(r"GLOBAL ([\w.]*\w) ")  # in torch's message
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
        rename: Our name of a tensor, by the file's; "" leaves it out.
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
        # Kept, as one without a memory map is read whole.
        self._open: dict[Path, Mapping] = {path: _open(path) for path in self.paths}
        for path, opened in self._open.items():
            for theirs in opened.keys():  # noqa: SIM118 - of safetensors no mapping
                name = rename(theirs)
                if not name:
                    continue
                if files and name in self._files:
                    earlier = self._files[name][0]
                    raise ValueError(f"{path} has the tensor {name}, and so has {earlier}")
                self._files[name] = (path, theirs)
        if files is None:
            self._tie(rename)

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

    def _tie(self, rename: Callable[[str], str]) -> None:
        """Gives an embedding its name that stands under another of those that share it."""
        is_pair = any("encoder.layers." in name for name in self._files)
        is_wrapped = any("language_model." in name for name in self._files)
        # A tower for images has an encoder too.
        names, stands_for = TIED_WITH_IMAGES if is_wrapped else TIED_PAIR if is_pair else TIED
        if any(rename(name) in self._files for name in names) or not _is_tied(self.folder):
            return
        if is_wrapped:  # under one of two prefixes: that of the layers
            begin = [f"{name.removesuffix('embed_tokens.weight')}layers." for name in names]
            names = names if any(each.startswith(begin[0]) for each in self._files) else names[1:]
        for other in filter(self._files.__contains__, map(rename, stands_for)):
            self._files[rename(names[0])] = self._files.pop(other)
            return

    def _tensor(self, name: str):
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        path, theirs = self._files[name]
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


def resolve(name: str) -> Path:
    """A folder as it is, or a hub id's snapshot, downloaded if need be.

    Raises:
        ValueError: Neither exists, or it is a file or a folder of GGUF.
    """
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name} is a file; name its folder, {path.parent}")
    packed = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if packed and not (path / "config.json").is_file():
        steps = f"`mtllm models import {packed[0]} --out DIR`, and name DIR"
        raise ValueError(f"{name} is GGUF, which is made a model's folder first: {steps}")
    return path if path.is_dir() else hub.fetch(name)


def check_model(folder: Path, name: str) -> None:
    """Looks whether a folder is a model's, before its configuration is read.

    Args:
        name: Where the user named it.

    Raises:
        ValueError: It holds adapters alone, or git-lfs's pointers.
    """
    # Adapters' folders may have a copy of their model's configuration.
    weights = (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*"))
    if (folder / ADAPTER_CONFIG).is_file() and not weights:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
        fix = f"put it into model.adapters, and the model that it is for, {base}, as model.decoder"
        raise ValueError(f"{name}: {folder} has adapters and no model's weights; {fix}")
    if (folder / "config.json").is_file():
        check_pulled(folder / "config.json")


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
    is_whole = (folder / "tokenizer.json").is_file()
    patterns = (*TOKENIZER_FILES, *(() if is_whole else VOCABULARIES))
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _is_tied(folder: Path) -> bool:
    """Whether a model's embedding and head are one tensor, by its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    # What is not said is as the family has it.
    kinds = ("m2m_100", "gemma", "smollm3", "mistral3")
    by_family = str(config.get("model_type")).startswith(kinds)
    return bool(config.get("tie_word_embeddings", by_family))


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


def _open(path: Path):
    """The file's tensors by name, memory-mapped where its format can be."""
    check_pulled(path)
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        # Those of torch before 1.6 are no zip files.
        with warnings.catch_warnings(action="ignore"):  # of pickles that others wrote
            is_mapped = zipfile.is_zipfile(path)
            tensors = torch.load(path, mmap=is_mapped, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # and what it says is advice to run it
        asked = _FOREIGN.search(str(error))
        reason = f"asks for {asked[1]}, and code is never run" if asked else "is no file of weights"
        raise ValueError(f"{path} {reason}; take safetensors, or save its tensors anew") from error
    except Exception as error:  # each library has its own types for a cut or damaged file
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path} holds something else than tensors by their names")
    return tensors
