"""Shards as files: tars that are checked against what a manifest says of them, then read by offset.

Plain WebDataset loses the rest of a shard that is damaged at a header, without an error; counts and
hashes are what makes that detectable.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mtllm_engine.files import (
    cache_folder,
    is_sealed,
    last_checked,
    making,
    once_a_run,
    sha256_of,
    write_sealed,
)

_SKIPPED = re.compile(r"__[^/]*__($|/)")  # member names that WebDataset passes over
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedShardError(ValueError):
    """A shard that is not what its manifest says, or that does not read to its end."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a manifest says of a tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


def describe_shard(path: Path, samples: int) -> Shard:
    """What a manifest is to say of a tar that holds so many samples."""
    num_bytes = path.stat().st_size
    return Shard(name=path.name, samples=samples, bytes=num_bytes, sha256=sha256_of(path))


class OpenShard:
    """A shard that has been found sound, open for reading; no more than its index is in memory.

    The check, which reads every byte, is made once per run and node. Its other result, where each
    text lies, is kept in a cache that the ranks share, as long as size and time stay.

    Args:
        shard: What the manifest says of it.
        extension: Of the member that is read, in each sample.
        checks_anew: Whatever the cache says.

    Raises:
        DamagedShardError: It is not what the manifest says, or cannot be read.
    """

    def __init__(
        self, path: Path, shard: Shard, extension: str, *, checks_anew: bool = False
    ) -> None:
        self.path = path
        what = _state_of(path, shard)
        once_a_run(what, lambda: _check(path, shard), anew=checks_anew)
        index_of = _counted_index if checks_anew else _cached_index
        self._index = index_of(path, shard, extension)
        with _damage_named(path):
            self._file = path.open("rb", buffering=0)

    def member(self, number: int) -> tuple[str, bytes | None]:
        """A sample's key (WebDataset's `__key__`) and its member's content; None: it has none.

        Raises:
            DamagedShardError: The shard has been cut since, or cannot be read.
        """
        raw_key, offset, size = self._index[number].item()
        key = raw_key.decode("utf-8", "surrogateescape")
        if offset < 0:
            return key, None
        with _damage_named(self.path):
            content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise DamagedShardError(f"shard {self.path} was cut while it was read")
        return key, content

    def close(self) -> None:
        self._file.close()


def build_index(path: Path, extension: str) -> np.ndarray:
    """One row per sample: key, and offset and size of its member `extension` (-1 if it has none).

    Raises:
        DamagedShardError: The tar does not read cleanly to its end.
    """
    rows = []
    with path.open("rb") as file:
        for sample in _samples(file, path):
            offset, size = sample.get(extension, (-1, -1))
            rows.append((sample["__key__"].encode("utf-8", "surrogateescape"), offset, size))
    width = max([1, *(len(key) for key, _, _ in rows)])
    return np.array(rows, dtype=[("key", f"S{width}"), ("offset", "<i8"), ("size", "<i8")])


def extensions_of(path: Path) -> list[str]:
    """Of the members that a tar's first sample has."""
    with path.open("rb") as file:
        return [name for name in next(_samples(file, path), {}) if not name.startswith("__")]


def last_check(path: Path, shard: Shard) -> float | None:
    """When a shard was last found sound, as `time.time()`; None: never, as it is now."""
    try:
        return last_checked(_state_of(path, shard))
    except DamagedShardError:
        return None


def _state_of(path: Path, shard: Shard) -> str:
    with _damage_named(path):
        state = path.stat()
    identity = [asdict(shard), str(path.absolute()), state.st_size, state.st_mtime_ns]
    return json.dumps(identity)


def _check(path: Path, shard: Shard) -> None:
    with _damage_named(path):
        size = path.stat().st_size
        if size < shard.bytes:
            raise DamagedShardError(f"shard {path} is cut: {size} of {shard.bytes} bytes")
        if size > shard.bytes:
            raise DamagedShardError(
                f"shard {path} is too long: {size} bytes, its manifest says {shard.bytes}"
            )
        if sha256_of(path) != shard.sha256:
            raise DamagedShardError(f"shard {path} does not match its sha256")


def _cached_index(path: Path, shard: Shard, extension: str) -> np.ndarray:
    """A sound shard's index, memory-mapped; of a node's ranks one makes it and the others wait."""
    identity = json.dumps([_state_of(path, shard), extension])
    cached = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.npy"
    if not is_sealed(cached):
        with making(cached):
            if not is_sealed(cached):
                content = io.BytesIO()
                np.save(content, _counted_index(path, shard, extension))
                write_sealed(cached, content.getvalue())
    return map_array(cached)


def map_array(path: Path) -> np.ndarray:
    """An array's file, memory-mapped.

    numpy reads its header as Python source, which CPython 3.11 now and then cannot while another
    thread does so too: that says nothing of the file, and the next try succeeds.
    """
    for _ in range(9):
        with contextlib.suppress(SystemError):
            return np.load(path, mmap_mode="r")
    return np.load(path, mmap_mode="r")


def _counted_index(path: Path, shard: Shard, extension: str) -> np.ndarray:
    with _damage_named(path):
        index = build_index(path, extension)
    if len(index) != shard.samples:
        raise DamagedShardError(
            f"shard {path} holds {len(index)} samples, its manifest says {shard.samples}"
        )
    return index


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedShardError(f"shard {path} is missing") from None
    except OSError as error:
        raise DamagedShardError(f"shard {path} cannot be read: {error.strerror or error}") from None


def _samples(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    """WebDataset's samples, by its own grouping: (offset, size) of each member for its bytes."""
    from webdataset.tariterators import group_by_keys  # imports torch

    try:
        yield from group_by_keys(
            {"fname": name, "data": where, "__url__": ""} for name, where in _members(file, path)
        )
    except DamagedShardError:
        raise
    except (tarfile.TarError, ValueError) as error:  # two members of one name are a ValueError
        raise DamagedShardError(f"shard {path} is not a sound tar: {error.args[0]}") from None


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (offset, size) of each member that WebDataset would read, up to a sound end."""
    magic = file.read(8)
    for prefix, kind in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise DamagedShardError(
                f"shard {path} is compressed ({kind}) and cannot be read by offset; decompress it"
            )
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.issparse():
                raise DamagedShardError(
                    f"shard {path} has a sparse member, {member.name}; write it with another tar"
                )
            if member.isreg() and not _SKIPPED.match(member.name):
                yield member.name, (member.offset_data, member.size)
        _check_end(file, path, tar.offset)


def _check_end(file: BinaryIO, path: Path, end: int) -> None:
    """Raises unless the archive ends properly: cut between members, it looks whole to tarfile."""
    file.seek(end)
    blocks = file.read(2 * tarfile.BLOCKSIZE)
    if len(blocks) < 2 * tarfile.BLOCKSIZE:
        raise DamagedShardError(f"shard {path} is cut: no end of the archive at byte {end}")
    if any(blocks):
        raise DamagedShardError(f"shard {path} is damaged at byte {end}: no valid header there")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            where = f"after its end of the archive at byte {end}"
            raise DamagedShardError(f"shard {path} goes on {where}; WebDataset stops there")
