"""Stored states of the teacher, beside the corpus that they were made from.

`targets-NAME/` in a corpus' folder holds one .npy per shard, (samples, P, D), a row for each sample in the shard's
order, and last a manifest.json that says whose states these are, of which text, and what they took to make. Who changes
whose or which is refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.data.shards import BadDocument, Manifest

FORMAT = "mtllm-targets/1"


class Targets:
    """Reads what `Writer` wrote.

    Args:
        corpus: The folder of shards.
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
            raise ValueError(f"{corpus} has no targets {name!r}; make them with `mtllm targets`") from None
        except ValueError:
            raise ValueError(f"{self.folder / 'manifest.json'} is not JSON; run `mtllm targets` again") from None
        expected = {"format": FORMAT, "corpus": manifest.fingerprint, **maker}
        for key, value in expected.items():
            if saved.get(key) != value:
                told = f"{self.folder} was made with another {key} ({saved.get(key)!r}, not {value!r})"
                raise ValueError(f"{told}; remove it and run `mtllm targets`, or name another data.targets")
        self._names = [shard.name for shard in manifest.shards]
        self._open: dict[int, np.ndarray] = {}

    def read(self, shard: int, index: int) -> np.ndarray:
        """fp32 (P, D). Raises BadDocument: the sample had none, because it could not be used then."""
        states_PD = self._shard(shard)[index].astype(np.float32)
        if np.isnan(states_PD).any():
            raise BadDocument(f"{self.folder}: number {index} of {self._names[shard]} has no stored states")
        return states_PD

    def zeros(self) -> np.ndarray:
        """fp32 (1, D): a state of no meaning."""
        return np.zeros((1, self._shard(0).shape[2]), np.float32)

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = np.load(self.folder / f"{self._names[shard]}.npy", mmap_mode="r")
        return self._open[shard]


class Writer:
    """Takes states in any order; what is not there in the end is told apart from what is.

    Args:
        shape: (P, D) of every sample.
        dtype: float32, or float16 for a teacher in half precision.
    """

    def __init__(
        self, corpus: Path, name: str, maker: Mapping[str, Any], shape: tuple[int, int], dtype: np.dtype
    ) -> None:
        self.final = folder_of(corpus, name)
        self.draft = self.final.with_name(f".{self.final.name}.partial")
        manifest = Manifest.load(corpus)
        self.record = {"format": FORMAT, "corpus": manifest.fingerprint, **maker}
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        self._shards = [self._create(shard.name, (shard.samples, *shape), dtype) for shard in manifest.shards]

    def write(self, shard: int, index: int, states_PD: np.ndarray) -> None:
        """Raises: ValueError: A state does not fit the dtype."""
        stored_PD = states_PD.astype(self._shards[shard].dtype)
        if not np.isfinite(stored_PD).all():
            raise ValueError(f"{self.final}: a state of up to {np.abs(states_PD).max():.3g} does not fit float16")
        self._shards[shard][index] = stored_PD

    def finish(self, *, gpu_hours: float, flops: float) -> Path:
        """Puts the folder in its place, complete. Args: gpu_hours, flops: What the states took to make."""
        for states in self._shards:
            states.flush()
        self._shards.clear()
        with (self.draft / "manifest.json").open("w", encoding="utf-8") as file:
            json.dump(self.record | {"gpu_hours": gpu_hours, "flops": flops}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.final, ignore_errors=True)
        self.draft.rename(self.final)
        return self.final

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        states = np.lib.format.open_memmap(self.draft / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        states[:] = np.nan
        return states


def cost_of(corpus: Path, name: str) -> tuple[float, float]:
    """GPU-hours and FLOPs that the states took to make. Raises: KeyError: They do not say."""
    saved = json.loads((folder_of(corpus, name) / "manifest.json").read_text("utf-8"))
    return saved["gpu_hours"], saved["flops"]


def folder_of(corpus: Path, name: str) -> Path:
    return corpus / f"targets-{name}"
