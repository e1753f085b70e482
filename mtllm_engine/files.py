"""Files and folders that are there whole or not at all, links that always point somewhere, names
that are no paths, hashes, and the folder of caches with what has been checked on this node.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_NAME = 200  # bytes; what is made of it is longer, and a file's name ends at 255
_IMPORTED_S = time.time()
_KEPT_S = 30 * 24 * 3600  # how long it is remembered when something was checked
_HASH_BYTES = hashlib.sha256().digest_size
_HOME = re.compile(r"(?:[\w.+-]+:)?(~)")  # also behind the name of a data set

_POINTER = b"version https://git-lfs"
_NEIGHBOUR = re.compile(r"[\w-][\w.-]{,254}")
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that know no symbolic links."""


def expand(path: str) -> str:
    """`~/x` and `DATASET:~/x` with the user's home in the place of `~`; all else as it is."""
    home = _HOME.match(path)
    return path[: home.start(1)] + os.path.expanduser(path[home.start(1) :]) if home else path


def expanded_path(path: str) -> Path:
    """`expand` for command lines, which take paths alone."""
    return Path(expand(path))


def is_name(text: str) -> bool:
    """Whether a text that a user chose can name a file or folder: letters, digits and `_.+-`."""
    return bool(re.fullmatch(r"\w[\w.+-]*", text)) and len(text.encode()) <= LONGEST_NAME


def check_name(name: str, what: str) -> str:
    """A name that a file gives, whatever its letters, if it is one component of a path: only then
    may it be joined to a folder that it must not lead out of.

    Args:
        what: What is so named, for the error.

    Raises:
        ValueError: It is none.
    """
    if name in ("", ".", "..") or re.search("[/\0\ud800-\udfff]", name):
        rule = "must be the name of one file or folder, without slashes and not . or .."
        raise ValueError(f"{what} {rule}, not {name!r}")
    return name


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
    """Makes `path` a link to its neighbour `target`, or points it there: at no moment is there
    none. A file that holds the name where the file system knows no links; `linked` reads both.

    A folder in its place, as a copy that followed the link leaves, is removed.
    """
    draft = _draft_of(path)
    draft.unlink(missing_ok=True)
    try:
        draft.symlink_to(target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with draft.open("wb") as file:
            file.write(f"{target}\n".encode())
            sync(file)
    if path.is_dir() and not path.is_symlink():
        copy = path.with_name(f".{path.name}.copy.partial")
        shutil.rmtree(copy, ignore_errors=True)
        path.rename(copy)
        os.replace(draft, path)
        shutil.rmtree(copy)
    else:
        os.replace(draft, path)
    sync_folder(path.parent)


def linked(path: Path) -> Path | None:
    """The folder that `link` made `path` point to, if it is there."""
    if path.is_symlink():
        target = path.resolve()
    elif path.is_file():
        name = path.read_text(errors="replace").strip()
        if not _NEIGHBOUR.fullmatch(name):
            return None
        target = path.resolve().with_name(name)
    else:
        return None
    return target if target.is_dir() else None


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


def check_pulled(path: Path) -> None:
    """Raises: ValueError: What lies there is not the file, but git-lfs's pointer to it."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            fix = f"run `git lfs pull` in {path.parent}"
            raise ValueError(f"{path} is a git-lfs pointer, and not the file itself; {fix}")


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


@contextlib.contextmanager
def making(cached: Path) -> Iterator[None]:
    """Of a node's processes one at a time makes a file of the cache; the others wait.

    Raises:
        ValueError: The cache cannot be written.
    """
    try:
        with cached.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        fix = "free some space or set XDG_CACHE_HOME"
        raise ValueError(
            f"cannot write into the cache {cached.parent}: {error.strerror}; {fix}"
        ) from None


def write_sealed(cached: Path, content: bytes) -> None:
    """An `atomic_file` of the cache that ends in a hash of its content and name."""
    with atomic_file(cached) as file:
        file.write(content)
        file.write(_seal(cached, content))


def is_sealed(cached: Path) -> bool:
    """Whether a file is there as `write_sealed` left it, to the last bit."""
    try:
        content = cached.read_bytes()
    except OSError:
        return False
    return content[-_HASH_BYTES:] == _seal(cached, content[:-_HASH_BYTES])


def once_a_run(what: str, check: Callable[[], None], *, anew: bool = False) -> None:
    """Runs a check unless it has passed on this node since this run began.

    A check of an earlier run says nothing: disks and copies damage files and keep size and time.

    Args:
        what: What is checked; other words, another check.
        check: Raises when it fails, which is not remembered.
        anew: Whatever is remembered.

    Raises:
        ValueError: The cache cannot be written.
    """
    record = _record_of(what)
    if not anew and _holds(record):
        return
    with making(record):
        if anew or not _holds(record):
            check()
            earliest = time.time() - _KEPT_S
            recent = {boot: at for boot, at in _checked_at(record).items() if at > earliest}
            write_sealed(record, json.dumps(recent | {boot(): time.time()}).encode())


def last_checked(what: str) -> float | None:
    """When `once_a_run` last passed, as `time.time()`; None: nobody remembers."""
    return max(_checked_at(_record_of(what)).values(), default=None)


def _holds(record: Path) -> bool:
    return _run_start() <= _checked_at(record).get(boot(), 0.0) <= time.time()


def _checked_at(record: Path) -> dict[str, float]:
    """By boot, as nodes that share a cache have disks of their own."""
    return json.loads(record.read_bytes()[:-_HASH_BYTES]) if is_sealed(record) else {}


def _record_of(what: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(what.encode()).hexdigest()}.checked"


def _seal(cached: Path, content: bytes) -> bytes:
    return hashlib.sha256(cached.name.encode() + b"\n" + content).digest()


@functools.cache
def boot() -> str:
    """What tells a machine's run from its next."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


@functools.cache
def _run_start() -> float:
    """When this run began: of ranks, whose launcher is one for a node, when that did."""
    process = os.getppid() if "RANK" in os.environ else os.getpid()
    stat = process_stat(process)
    if not stat:  # hidden from us: then each rank checks by itself
        return _IMPORTED_S
    since_boot_s = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    started_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s
    return min(started_s, _IMPORTED_S)


def process_stat(process: int) -> list[str]:
    """What /proc says of a process behind its name (proc(5)): its state, parent, ..., as item 19
    its start in ticks since boot; empty for none.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record as JSON that holds its own hash."""
    sha256 = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps({**record, "sha256": sha256}, indent=1).encode()


def unsealed(content: bytes) -> dict[str, Any]:
    """The record of `sealed`.

    Raises:
        ValueError: These are not the bytes that `sealed` returned; the message is a predicate.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(record, dict) or not record.pop("sha256", "") or sealed(record) != content:
        raise ValueError("is not what was written")
    return record


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
