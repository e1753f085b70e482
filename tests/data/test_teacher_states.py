"""Stored teacher states: what is written is read, and what does not fit is refused in one line."""

import os

import numpy as np
import pytest

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
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON; run `mtllm targets` again"):
        TeacherStates(corpus, "b", MAKER)
