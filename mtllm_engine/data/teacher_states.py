"""Stored states of the teacher, beside the corpus that they were made from.

`teacher_states-NAME/` in a corpus' folder holds one .npy per shard, (samples, P, D), a row for each
sample in the shard's order, and last a manifest.json that says whose states these are, of which
text, each file's sha256, and what they took to make. Who changes any of that is refused.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.data.shards import BadDocumentError, Manifest
from mtllm_engine.data.tars import map_array
from mtllm_engine.files import (
    atomic_file,
    atomic_folder,
    check_name,
    once_a_run,
    sealed,
    sha256_of,
    unsealed,
)

FORMAT = "mtllm-targets/2"
EARLIER = {"data.parts": "whole", "model.adapters": "", "model.encoder_prefix": ""}
"""Of a maker, what older states do not say."""


class TeacherStates:
    """Reads what `TeacherStatesWriter` wrote.

    Args:
        corpus: The folder of shards.
        name: `data.teacher_states`.
        maker: What the states depend on besides the text; must equal what they were written with.

    Raises:
        ValueError: There are none of this name, or text or maker are others, or what says so was
            changed.
    """

    def __init__(self, corpus: Path, name: str, maker: Mapping[str, Any]) -> None:
        self.folder = folder_of(corpus, name)
        manifest = Manifest.load(corpus)
        try:
            saved = _load_record(self.folder)
        except FileNotFoundError:
            raise ValueError(
                f"{corpus} has no data.teacher_states={name!r}; make them with `mtllm targets`"
            ) from None
        expected = {"format": FORMAT, "corpus": manifest.fingerprint, **maker}
        for key, value in expected.items():
            if (EARLIER | saved).get(key) != value:
                values = f"{saved.get(key)!r}, not {value!r}"
                fix = "remove it and run `mtllm targets`, or name another data.teacher_states"
                raise ValueError(f"{self.folder} was made with another {key} ({values}); {fix}")
        self._shards = manifest.shards
        self._shape_PD: list[int] = saved["shape"]
        self._sha256s: dict[str, str] = saved["files"]
        self._open: dict[int, np.ndarray] = {}

    def read(self, shard: int, index: int) -> np.ndarray:
        """fp32 (P, D).

        Raises:
            BadDocumentError: The sample had none, because it could not be used then.
            ValueError: The file is not what was written.
        """
        states_PD = self._opened(shard)[index].astype(np.float32)
        if np.isnan(states_PD).any():
            raise BadDocumentError(
                f"{self.folder}: number {index} of {self._shards[shard].name} has no stored states"
            )
        return states_PD

    def zeros(self) -> np.ndarray:
        """fp32 (1, D): a state of no meaning."""
        return np.zeros((1, self._shape_PD[1]), np.float32)

    def _opened(self, number: int) -> np.ndarray:
        """A shard's states, found to be those that were written once per run and node."""
        if number not in self._open:
            shard = self._shards[number]
            path = _file_of(self.folder, shard.name)
            try:
                states = _sound_states(path, self._sha256s.get(shard.name))
            except OSError as error:
                reason = f"cannot be read: {error.strerror or error}"
                raise ValueError(f"{path} {reason}; {_again(self.folder)}") from None
            shape = (shard.samples, *self._shape_PD)
            if states.shape != shape or states.dtype not in (np.float32, np.float16):
                has = f"{states.dtype} {states.shape}, not float32 or float16 {shape}"
                raise ValueError(f"{path} holds {has}; {_again(self.folder)}")
            self._open[number] = states
        return self._open[number]


def _sound_states(path: Path, sha256: str | None) -> np.ndarray:
    def check() -> None:
        if sha256_of(path) != sha256:
            raise ValueError(f"{path} does not match its sha256; {_again(path.parent)}")

    state = path.stat()
    what = [str(path.absolute()), sha256, state.st_size, state.st_mtime_ns]
    once_a_run(json.dumps(what), check)
    try:
        return map_array(path)
    except (ValueError, EOFError):
        raise ValueError(f"{path} is not a sound .npy file; {_again(path.parent)}") from None


def _again(folder: Path) -> str:
    return f"remove {folder} and run `mtllm targets` again"


def _load_record(folder: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not what was written.
    """
    path = folder / "manifest.json"
    try:
        return unsealed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}; {_again(folder)}") from None


class TeacherStatesWriter:
    """Takes states in any order; what is not there in the end is told apart from what is.

    Args:
        corpus: The folder of shards.
        name: `data.teacher_states`.
        maker: What the states depend on besides the text.
        shape: (P, D) of every sample.
        dtype: float32, or float16 for a teacher in half precision.
    """

    def __init__(
        self,
        corpus: Path,
        name: str,
        maker: Mapping[str, Any],
        shape: tuple[int, int],
        dtype: np.dtype,
    ) -> None:
        self.folder = folder_of(corpus, name)
        manifest = Manifest.load(corpus)
        self._record = {"format": FORMAT, "corpus": manifest.fingerprint, **maker, "shape": shape}
        self._ending = contextlib.ExitStack()
        self._draft = self._ending.enter_context(atomic_folder(self.folder, replaces=True))
        self._names = [shard.name for shard in manifest.shards]
        self._shards = [
            self._create(shard.name, (shard.samples, *shape), dtype) for shard in manifest.shards
        ]

    def write(self, shard: int, index: int, states_PD: np.ndarray) -> None:
        """Raises ValueError: A state does not fit the dtype."""
        with np.errstate(over="ignore"):  # it is looked for below
            stored_PD = states_PD.astype(self._shards[shard].dtype)
        if not np.isfinite(stored_PD).all():
            largest = f"a state of up to {np.abs(states_PD).max():.3g}"
            raise ValueError(f"{self.folder}: {largest} does not fit float16")
        self._shards[shard][index] = stored_PD

    def finish(self, *, gpu_hours: float, flops: float) -> Path:
        """Gives the folder its name, complete, and returns it.

        Args:
            gpu_hours: What the states took to make.
            flops: Likewise.
        """
        for states in self._shards:
            states.flush()
        self._shards.clear()
        sha256s = {name: sha256_of(_file_of(self._draft, name)) for name in self._names}
        record = self._record | {"files": sha256s, "gpu_hours": gpu_hours, "flops": flops}
        with atomic_file(self._draft / "manifest.json") as file:
            file.write(sealed(record))
        self._ending.close()
        return self.folder

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        path = _file_of(self._draft, name)
        states = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        states[:] = np.nan
        return states


def cost_of(corpus: Path, name: str) -> tuple[float, float]:
    """GPU-hours and FLOPs that the states took to make.

    Raises:
        KeyError: They do not say.
    """
    saved = _load_record(folder_of(corpus, name))
    return saved["gpu_hours"], saved["flops"]


def folder_of(corpus: Path, name: str) -> Path:
    """Where a corpus' stored states of a name lie, or would.

    Raises:
        ValueError: The name could lead elsewhere.
    """
    return corpus / f"teacher_states-{check_name(name, 'data.teacher_states')}"


def _file_of(folder: Path, shard: str) -> Path:
    return folder / f"{shard}.npy"
