"""One run, one folder: a file LOCK says who works in a run's folder, so that nobody else does."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mtllm_engine.files import boot, process_stat
from mtllm_engine.world import World

NAME = "LOCK"
WAIT_S = 15.0  # for an owner that is about to leave, as ranks without a launcher are
BEAT_S = 10.0  # between two signs of life
STILL_S = 40.0  # after so long without one, an owner on another machine is dead
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def sole_owner(folder: Path, world: World) -> Iterator[None]:
    """Keeps a run's folder to this run, by rank 0; all ranks enter it. A dead owner's is taken
    over.

    Raises:
        ValueError: Another run works there; the message names it and the fix.
    """
    lock = _Lock(folder)
    world.on_main(lock.take)
    try:
        yield
    finally:
        lock.release()


def started(process: int) -> str:
    """What tells a process from an earlier one of the same number; "" for none."""
    stat = process_stat(process)
    return stat[19] if stat and stat[0] not in "ZX" else ""


class _Lock:
    """The kernel's lock on the file decides, where it reaches: on this machine, and on others if
    the file system passes it on. What the file says decides the rest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.owner = _this_process()
        self.file: BinaryIO | None = None
        self.made: list[Path] = []
        self.released = threading.Event()

    def take(self) -> None:
        """Raises: ValueError: A live owner has it."""
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline_s = time.monotonic() + WAIT_S
        while (owner := self._try()) is not None:
            if time.monotonic() >= deadline_s:
                fix = f"wait for it or set run.dir; if it is dead, remove {self.path}"
                raise ValueError(f"{self.folder}: {_words(owner)} works here; {fix}")
            time.sleep(0.2)
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.beats.start()

    def release(self) -> None:
        """Removes the file, and the folder if there was none before and nothing is in it."""
        if self.file is None:
            return
        self.released.set()
        self.beats.join()
        if _is_at(self.file, self.path):  # else somebody took us for dead
            self.path.unlink()
        self.file.close()
        with contextlib.suppress(OSError):
            for path in self.made:
                path.rmdir()

    def _try(self) -> dict[str, Any] | None:
        """The live owner; None: it is ours."""
        file = self.path.open("a+b")
        try:
            is_held = _flock(file)
        except BlockingIOError:
            owner = _read(self.path)
            file.close()
            return owner
        owner = _read(self.path)
        if not _is_at(file, self.path):  # released, and removed, since it was opened
            file.close()
            return {}
        if owner and self._is_alive(owner, is_held):
            file.close()
            return owner
        self.file = file
        self._write()
        if not is_held:  # two that found it free at once: the later one has it
            time.sleep(1.0)
            owner = _read(self.path)
            if {**owner, "beat": 0} != {**self.owner, "beat": 0}:
                self.file = None
                file.close()
                return owner
        return None

    def _is_alive(self, owner: dict[str, Any], is_held: bool) -> bool:
        """Whether the owner that a file names lives, though we hold, or cannot have, its lock."""
        if all(owner.get(key) == self.owner[key] for key in ("host", "boot")):
            is_running = started(owner.get("process", 0)) == owner.get("start")
            return is_running and not is_held
        # The lock of another machine may not reach here: a live owner writes.
        watch = f"watching for {STILL_S:.0f} s whether it lives"
        print(f"{self.path} is of {_words(owner)}: {watch}", file=sys.stderr, flush=True)
        deadline_s = time.monotonic() + STILL_S
        while time.monotonic() < deadline_s:
            time.sleep(min(1.0, STILL_S / 8))
            if _read(self.path) != owner:
                return True
        return False

    def _beat(self) -> None:
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a full disk does not end the run here
                self._write()

    def _write(self) -> None:
        self.owner["beat"] = time.time()
        content = json.dumps(self.owner).encode() + b"\n"
        self.file.truncate(0)
        self.file.write(content)  # at the end: opened for appending
        self.file.flush()


def _flock(file: BinaryIO) -> bool:
    """Whether the file is locked now; False: its file system knows no locks.

    Raises:
        BlockingIOError: Another process has it locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "process": process,
        "start": started(process),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(path: Path) -> dict[str, Any]:
    """Who a file says its owner is; nothing where it says none."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _words(owner: dict[str, Any]) -> str:
    if "process" not in owner:
        return "another run"
    where = f"process {owner['process']} on {owner.get('host')}"
    return f"another run ({where}, since {owner.get('since')})"


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
