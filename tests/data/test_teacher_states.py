"""Stored teacher states: what is written is read, and what does not fit is refused in one line."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine import files
from mtllm_engine.data.shards import BadDocumentError
from mtllm_engine.data.teacher_states import TeacherStates, TeacherStatesWriter, cost_of
from tests.support.tiny import pack_lines

MAKER = {"model": "a", "max_length": 64}


@pytest.fixture
def corpus(tmp_path):
    """Five documents in two shards."""
    return pack_lines(tmp_path / "corpus", list("abcde"), num_shards=2)


def writer(corpus, dtype=np.float32):
    return TeacherStatesWriter(corpus, "b", MAKER, (2, 3), np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_states_are_read_as_they_were_written(corpus, dtype):
    """In any order; a sample without any is a bad document."""
    states_PD = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    writing = writer(corpus, dtype)
    for index, factor in ((1, 2), (0, 1)):
        writing.write(1, index, factor * states_PD)
    folder = writing.finish(gpu_hours=0.5, flops=7.0)
    assert folder == corpus / "teacher_states-b" and cost_of(corpus, "b") == (0.5, 7.0)
    stored = TeacherStates(corpus, "b", MAKER)
    for index, factor in ((0, 1), (1, 2)):
        expected_PD = (factor * states_PD).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(stored.read(1, index), expected_PD)
        assert stored.read(1, index).dtype == np.float32
    with pytest.raises(BadDocumentError, match=r"number 2 of 000000\.tar has no stored states"):
        stored.read(0, 2)
    assert stored.zeros().shape == (1, 3) and not stored.zeros().any()


def test_nothing_is_left_of_a_writer_that_did_not_finish(corpus):
    before = sorted(os.listdir(corpus))
    writing = writer(corpus)
    writing.write(0, 0, np.zeros((2, 3), np.float32))
    del writing
    assert sorted(os.listdir(corpus)) == before


def test_a_finished_writer_takes_the_place_of_another(corpus):
    for value in (1.0, 2.0):
        writing = writer(corpus)
        writing.write(0, 0, np.full((2, 3), value, np.float32))
        writing.finish(gpu_hours=value, flops=0.0)
    assert TeacherStates(corpus, "b", MAKER).read(0, 0).tolist() == [[2.0] * 3] * 2
    assert cost_of(corpus, "b") == (2.0, 0.0)


def test_a_state_that_half_precision_cannot_hold_is_an_error(corpus):
    with pytest.raises(ValueError, match=r"a state of up to 7e\+04 does not fit float16"):
        writer(corpus, np.float16).write(0, 0, np.full((2, 3), 7e4, np.float32))


def test_states_that_do_not_fit_are_refused(corpus):
    with pytest.raises(ValueError, match="has no data.teacher_states='b'; make them with `mtllm"):
        TeacherStates(corpus, "b", MAKER)
    folder = writer(corpus).finish(gpu_hours=0.0, flops=0.0)
    with pytest.raises(ValueError, match=r"another model \('a', not 'c'\); .*data.teacher_states"):
        TeacherStates(corpus, "b", MAKER | {"model": "c"})
    TeacherStates(corpus, "b", MAKER | {"data.parts": "whole"})  # older ones do not say so
    with pytest.raises(ValueError, match=r"another data.parts \(None, not 'lines'\)"):
        TeacherStates(corpus, "b", MAKER | {"data.parts": "lines"})
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON; remove .* and run `mtllm targets` again"):
        TeacherStates(corpus, "b", MAKER)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A corpus with whole states beside it, and every byte of those."""
    corpus = pack_lines(tmp_path_factory.mktemp("stored") / "corpus", list("abcde"), num_shards=2)
    writing = writer(corpus)
    for shard, count in ((0, 3), (1, 2)):
        for index in range(count):
            writing.write(shard, index, np.full((2, 3), 10 * shard + index, np.float32))
    folder = writing.finish(gpu_hours=0.5, flops=7.0)
    return corpus, {path: path.read_bytes() for path in folder.iterdir()}


def read_by_a_new_run(corpus):
    with pytest.MonkeyPatch.context() as patch:
        now = time.time()
        patch.setattr(files, "_run_start", lambda: now)
        states = TeacherStates(corpus, "b", MAKER)
        for shard, count in ((0, 3), (1, 2)):
            for index in range(count):
                expected = np.full((2, 3), 10 * shard + index, np.float32)
                np.testing.assert_array_equal(states.read(shard, index), expected)
        return cost_of(corpus, "b")


@given(file=st.integers(0, 2), position=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_by_the_next_run(stored, file, position, bit):
    """Though size and times stay; of the manifest as of the states."""
    corpus, whole = stored
    path = sorted(whole)[file]
    damaged, times = bytearray(whole[path]), path.stat()
    damaged[position % len(damaged)] ^= 1 << bit
    assert read_by_a_new_run(corpus) == (0.5, 7.0)
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        with pytest.raises(ValueError, match="run `mtllm targets`") as error:
            read_by_a_new_run(corpus)
        assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    finally:
        path.write_bytes(whole[path])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "empty": lambda path: os.truncate(path, 0),
    "no rows": lambda path: np.save(path, np.zeros((0, 2, 3), np.float32)),
    "fewer rows": lambda path: np.save(path, np.load(path)[:2]),
    "another shape": lambda path: np.save(path, np.load(path)[:, :, :2]),
    "another dtype": lambda path: np.save(path, np.zeros((3, 2, 3), np.int64)),
    "noise": lambda path: path.write_bytes(b"noise"),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("is_hashed", [False, True], ids=["by its hash", "by its shape"])
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_states_are_one_line(corpus, kind, is_hashed):
    """Even where whoever changed them says so in the manifest."""
    folder = writer(corpus).finish(gpu_hours=0.0, flops=0.0)
    path = folder / "000000.tar.npy"
    CHANGES[kind](path)
    if is_hashed and path.exists():
        record = json.loads((folder / "manifest.json").read_text())
        record["files"][path.name.removesuffix(".npy")] = files.sha256_of(path)
        del record["sha256"]
        (folder / "manifest.json").write_bytes(files.sealed(record))
    states = TeacherStates(corpus, "b", MAKER)
    assert states.zeros().shape == (1, 3)
    with pytest.raises(ValueError, match=f"^{path} .*; remove {folder} and run `mtllm t") as error:
        states.read(0, 0)
    assert "\n" not in str(error.value) and not isinstance(error.value, BadDocumentError)


@pytest.mark.parametrize("name", ["x/../../y", "../y", "/y", "..", ".", "", "x/y", "y\0", "\ud800"])
def test_a_name_is_no_path(corpus, name):
    """Nothing is read, written or removed, in the corpus or beside it."""
    (corpus.parent / "y").mkdir()
    (corpus / "teacher_states-x").mkdir()  # through which `x/../../y` would lead
    (corpus.parent / "y" / "manifest.json").write_text("{}")
    before = sorted(corpus.parent.rglob("*"))
    message = "^data.teacher_states must be the name of one file or folder"
    with pytest.raises(ValueError, match=message):
        TeacherStates(corpus, name, MAKER)
    with pytest.raises(ValueError, match=message):
        TeacherStatesWriter(corpus, name, MAKER, (2, 3), np.dtype(np.float32))
    with pytest.raises(ValueError, match=message):
        cost_of(corpus, name)
    assert sorted(corpus.parent.rglob("*")) == before
