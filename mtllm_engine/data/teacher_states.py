"""Stored states of the teacher, beside the corpus that they were made from.

`teacher_states-NAME/` in a corpus' folder holds one .npy per shard, (samples, P, D), a row for each
sample in the shard's order, and last a manifest.json that says whose states these are, of which
text, and what they took to make. Who changes whose or which is refused.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.data.shards import BadDocumentError, Manifest
from mtllm_engine.files import atomic_folder, write_text

FORMAT = "mtllm-targets/1"


class TeacherStates:
    """Reads what `TeacherStatesWriter` wrote.

    Args:
        corpus: The folder of shards.
        name: `data.teacher_states`.
        maker: What the states depend on besides the text; must equal what they were written with.

    Raises:
        ValueError: There are none of this name, or text or maker are others.
    """

    def __init__(self, corpus: Path, name: str, maker: Mapping[str, Any]) -> None:
        self.folder = folder_of(corpus, name)
        manifest = Manifest.load(corpus)
        try:
            saved = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        except OSError:
            raise ValueError(
                f"{corpus} has no data.teacher_states={name!r}; make them with `mtllm targets`"
            ) from None
        except ValueError:
            raise ValueError(
                f"{self.folder / 'manifest.json'} is not JSON; run `mtllm targets` again"
            ) from None
        expected = {"format": FORMAT, "corpus": manifest.fingerprint, **maker}
        for key, value in expected.items():
            if saved.get(key) != value:
                values = f"{saved.get(key)!r}, not {value!r}"
                fix = "remove it and run `mtllm targets`, or name another data.teacher_states"
                raise ValueError(f"{self.folder} was made with another {key} ({values}); {fix}")
        self._names = [shard.name for shard in manifest.shards]
        self._open: dict[int, np.ndarray] = {}

    def read(self, shard: int, index: int) -> np.ndarray:
        """fp32 (P, D).

        Raises:
            BadDocumentError: The sample had none, because it could not be used then.
        """
        states_PD = self._shard(shard)[index].astype(np.float32)
        if np.isnan(states_PD).any():
            raise BadDocumentError(
                f"{self.folder}: number {index} of {self._names[shard]} has no stored states"
            )
        return states_PD

    def zeros(self) -> np.ndarray:
        """fp32 (1, D): a state of no meaning."""
        return np.zeros((1, self._shard(0).shape[2]), np.float32)

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = np.load(self.folder / f"{self._names[shard]}.npy", mmap_mode="r")
        return self._open[shard]


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
        self._record = {"format": FORMAT, "corpus": manifest.fingerprint, **maker}
        self._ending = contextlib.ExitStack()
        self._draft = self._ending.enter_context(atomic_folder(self.folder, replaces=True))
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
        record = self._record | {"gpu_hours": gpu_hours, "flops": flops}
        write_text(self._draft / "manifest.json", json.dumps(record, indent=1))
        self._ending.close()
        return self.folder

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        path = self._draft / f"{name}.npy"
        states = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        states[:] = np.nan
        return states


def cost_of(corpus: Path, name: str) -> tuple[float, float]:
    """GPU-hours and FLOPs that the states took to make.

    Raises:
        KeyError: They do not say.
    """
    saved = json.loads((folder_of(corpus, name) / "manifest.json").read_text("utf-8"))
    return saved["gpu_hours"], saved["flops"]


def folder_of(corpus: Path, name: str) -> Path:
    """Where a corpus' stored states of a name lie, or would."""
    return corpus / f"teacher_states-{name}"
