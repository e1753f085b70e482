"""Files and folders that are there whole or not at all, links that always point somewhere, hashes,
and the folder of caches.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_HOME = re.compile(r"(?:[\w.+-]+:)?(~)")  # also behind the name of a data set


def expand(path: str) -> str:
    """`~/x` and `DATASET:~/x` with the user's home in the place of `~`; all else as it is."""
    home = _HOME.match(path)
    return path[: home.start(1)] + os.path.expanduser(path[home.start(1) :]) if home else path


def expanded_path(path: str) -> Path:
    """`expand` for command lines, which take paths alone."""
    return Path(expand(path))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` complete and on disk, or not at all."""
    draft = _draft_of(path)
    try:
        with draft.open("wb") as file:
            yield file
            sync(file)
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """An `atomic_file` of UTF-8 text."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` in the end, or goes away.

    What is in it is on disk by then if whoever wrote it called `sync`. A killed process leaves its
    draft behind, which goes when the same path is asked for again.

    Args:
        replaces: A folder that is at `path` in the end is removed, instead of being an error.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not _is_alive(leftover.name.split(".")[-2]):
            shutil.rmtree(leftover, ignore_errors=True)
    draft = _draft_of(path)
    try:
        draft.mkdir(parents=True)
        yield draft
        sync_folder(draft)
        if replaces:
            shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def link(path: Path, target: str) -> None:
    """Makes `path` a link to `target`, or points it there: at no moment is there none."""
    draft = _draft_of(path)
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    os.replace(draft, path)
    sync_folder(path.parent)


def sync(file: BinaryIO) -> None:
    """Has what was written to a file on disk when it returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on disk when it returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The first folder for caches that is ours, as libraries are loaded from it, and that can be
    written and locked (a home on a network disk may refuse either).

    Raises:
        ValueError: There is none.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "mtllm", Path(tempfile.gettempdir()) / f"mtllm-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError:
            continue
        if folder.stat().st_uid == os.getuid():
            return folder
    raise ValueError("no folder for caches can be written; set XDG_CACHE_HOME")


def _draft_of(path: Path) -> Path:
    """Where this process makes what shall be at a path."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True
