"""Files and folders that are there whole or not at all; links, hashes, caches and homes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.files import (
    atomic_file,
    atomic_folder,
    cache_folder,
    check_name,
    expand,
    expanded_path,
    link,
    sha256_of,
    sync,
    write_text,
)
from tests.support.machine import ROOT

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
CALLS = [(os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename"), (Path, "symlink_to")]


@contextlib.contextmanager
def failing_at(number: int) -> Iterator[list[str]]:
    """The disk is full from a system call on; yields those that were tried."""
    tried: list[str] = []

    def failing(name, call):
        def wrapped(*arguments, **options):
            tried.append(name)
            if len(tried) >= number:
                raise FULL_DISK
            return call(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, failing(name, getattr(owner, name)))
        yield tried


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path, replaces=True) as draft:
        (draft / "deep").mkdir()
        with (draft / "deep" / "text").open("wb") as file:
            file.write(text.encode())
            sync(file)


def text_in(path: Path) -> str:
    return (path / "deep" / "text" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITERS = [write_file, write_text, write_folder]


@given(writer=st.sampled_from(WRITERS), texts=st.lists(st.text(st.characters(codec="utf-8"))))
def test_the_last_text_is_there_and_nothing_else(tmp_path_factory, writer, texts):
    folder = tmp_path_factory.mktemp("written")
    for text in texts:
        writer(folder / "x [a]*", text)
        stored = folder / "x [a]*"
        content = (stored / "deep" / "text" if stored.is_dir() else stored).read_bytes()
        assert content == text.encode() and names(folder) == ["x [a]*"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, writer, existing: bool):
    """Whichever call it refuses: the old text, or the new one where all of it had been written."""
    with failing_at(1 << 30) as tried:
        writer(tmp_path / "trial", "new")
    assert "fsync" in tried
    for number in range(1, len(tried) + 1):
        path = tmp_path / str(number) / "x"
        path.parent.mkdir()
        if existing:
            writer(path, "old")
        with pytest.raises(OSError, match="No space left"), failing_at(number):
            writer(path, "new")
        assert set(names(path.parent)) <= {"x"}
        if number == len(tried):  # the name, which the last call makes durable, is the new one's
            assert text_in(path) == "new"
        elif path.exists():
            assert existing and text_in(path) == "old"
        else:
            assert not existing or writer is write_folder


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_what_was_there(tmp_path: Path, writer, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)), writer(tmp_path / "x") as draft:
        if isinstance(draft, Path):
            (draft / "half").write_text("ne")
        else:
            draft.write(b"ne")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_file_is_not_there_before_its_end(tmp_path: Path):
    with atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "half"


def test_a_folder_takes_no_other_ones_place_unless_told_to(tmp_path: Path):
    write_folder(tmp_path / "x", "old")
    with pytest.raises(OSError), atomic_folder(tmp_path / "x") as draft:
        (draft / "new").touch()
    assert names(tmp_path) == ["x"] and text_in(tmp_path / "x") == "old"
    with atomic_folder(tmp_path / "x", replaces=True) as draft:
        (draft / "new").touch()
    assert names(tmp_path / "x") == ["new"]


def test_a_folders_parents_are_made(tmp_path: Path):
    write_folder(tmp_path / "a" / "b" / "x", "new")
    assert text_in(tmp_path / "a" / "b" / "x") == "new"


KILLED = """
import os, sys
from pathlib import Path
from mtllm_engine.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as draft:
    (draft / "half").touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    """But not what a living one, or one of another path, is about to finish."""
    path = tmp_path / "x [a]"
    command = [sys.executable, "-c", KILLED, path]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    (leftover,) = names(tmp_path)
    living, dead = os.getppid(), 1 << 23  # above any process's number
    others = [f".x [a].{living}.partial", f".x [a].b.{living}.partial", f".y.{dead}.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    write_folder(path, "new")
    assert leftover.startswith(".x [a].") and leftover not in names(tmp_path)
    assert names(tmp_path) == sorted([*others, "x [a]"])


@given(targets=st.lists(st.sampled_from("abc"), min_size=1))
def test_a_link_points_to_its_last_target(tmp_path_factory, targets):
    folder = tmp_path_factory.mktemp("linked")
    for target in targets:
        link(folder / "latest", target)
        assert os.readlink(folder / "latest") == target and names(folder) == ["latest"]


def test_a_link_that_cannot_be_moved_points_where_it_did(tmp_path: Path):
    link(tmp_path / "latest", "a")
    with failing_at(1 << 30) as tried:
        link(tmp_path / "latest", "b")
    for number in range(1, len(tried) + 1):
        link(tmp_path / "latest", "a")
        with pytest.raises(OSError), failing_at(number):
            link(tmp_path / "latest", "b")
        assert os.readlink(tmp_path / "latest") == ("b" if number == len(tried) else "a")
    link(tmp_path / "latest", "c")
    assert os.readlink(tmp_path / "latest") == "c" and names(tmp_path) == ["latest"]


@given(st.binary())
def test_sha256_is_hashlibs(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_caches_lie_where_they_can_be_written_and_locked(tmp_path: Path, monkeypatch):
    """In XDG_CACHE_HOME or ~/.cache, else among temporary files; or that is said."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "mtllm" and cache_folder().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mtllm"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "tmp" / f"mtllm-{os.getuid()}"

    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        cache_folder()


@given(st.text())
def test_only_a_home_is_expanded(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/home/me")
        assert expand(f"~/{text}") == f"/home/me/{text}"
        assert expand(f"squad:~/{text}") == f"squad:/home/me/{text}"
        assert expanded_path(f"~/{text}") == Path(f"/home/me/{text}")
        assert expand(f"/{text}") == f"/{text}" and expand(f"a/{text}") == f"a/{text}"
        assert expand("~") == "/home/me" and expand("") == ""


PARTS = st.sampled_from(["..", ".", "/", "a", "\0", "\ud800", "~", "é", "\\", "..tar"])
NAMES = st.lists(PARTS, max_size=4).map("".join) | st.text(st.characters(), max_size=6)


@given(name=NAMES)
def test_a_name_is_one_component_of_a_path(name):
    try:
        assert check_name(name, "a name") == name
    except ValueError as error:
        assert str(error).startswith("a name must be the name of one file or folder")
        assert name in ("", ".", "..") or set(name) & set("/\0") or not encodes(name)
    else:
        inside = os.path.normpath(f"/folder/{name}")
        assert inside == f"/folder/{name}" and Path(inside).parent == Path("/folder")


def encodes(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


LAUNCHER = """
import subprocess, sys
rank = "import sys; from mtllm_engine import files; " \
       "files.once_a_run('this', lambda: open(sys.argv[1], 'a').write('checked '))"
ranks = [subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]]) for _ in range(3)]
sys.exit(sum(each.wait() for each in ranks))
"""


def test_what_is_checked_is_checked_once_by_each_run(tmp_path):
    """A run is its launcher: its ranks, at once or one after the other, share what they check."""
    log = tmp_path / "log"
    environment = os.environ | {"RANK": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for runs in (1, 2):
        command = [sys.executable, "-c", LAUNCHER, log]
        subprocess.run(command, env=environment, check=True, cwd=ROOT)
        assert log.read_text().split() == ["checked"] * runs
