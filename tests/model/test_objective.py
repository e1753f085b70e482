import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.model.objective import cosine, fvu


@st.composite
def states(draw):
    """Pooled states of a student and a teacher, (P, D) each, on any scale, around any mean."""
    shape = draw(st.tuples(st.integers(2, 12), st.integers(1, 6)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale, mean, error = draw(st.tuples(st.floats(1e-3, 1e3), st.floats(-3, 3), st.floats(0, 3)))
    teacher_PD = scale * (generator.normal(size=shape) + mean)
    return teacher_PD + error * scale * generator.normal(size=shape), teacher_PD


def moments(student_PD, teacher_PD):
    """The layout that `objective` names: spans, squared error, cosine, squared teacher norm, then
    the teacher's sum.
    """
    norms_P = np.linalg.norm(student_PD, axis=1) * np.linalg.norm(teacher_PD, axis=1)
    sums = [
        len(teacher_PD),
        np.square(student_PD - teacher_PD).sum(),
        ((student_PD * teacher_PD).sum(axis=1) / norms_P).sum(),
        np.square(teacher_PD).sum(),
    ]
    return torch.tensor([*sums, *teacher_PD.sum(axis=0)], dtype=torch.float64)


@given(states())
def test_fvu_is_the_error_over_the_teachers_variance(states):
    student_PD, teacher_PD = states
    error = np.square(student_PD - teacher_PD).mean(axis=0).sum()
    assert fvu(moments(student_PD, teacher_PD)) == pytest.approx(
        error / teacher_PD.var(axis=0).sum(), rel=1e-9
    )


@given(states())
def test_cosine_is_the_mean_over_spans(states):
    student_PD, teacher_PD = map(torch.tensor, states)
    expected = torch.cosine_similarity(student_PD, teacher_PD).mean().item()
    assert cosine(moments(*states)) == pytest.approx(expected, rel=1e-9)


@given(states())
def test_fvu_is_one_for_the_mean_and_zero_for_the_teacher_itself(states):
    _, teacher_PD = states
    mean_PD = np.broadcast_to(teacher_PD.mean(axis=0), teacher_PD.shape)
    assert fvu(moments(mean_PD, teacher_PD)) == pytest.approx(1, rel=1e-9)
    perfect = moments(teacher_PD, teacher_PD)
    assert fvu(perfect) == 0 and cosine(perfect) == pytest.approx(1, rel=1e-12)


@given(states=states(), data=st.data())
def test_moments_add_up_over_any_parts(states, data):
    """Over micro-batches, idle ones too (all zeros), ranks and steps."""
    student_PD, teacher_PD = states
    cut = data.draw(st.integers(1, len(teacher_PD) - 1))
    parts = [moments(student_PD[part], teacher_PD[part]) for part in (slice(cut), slice(cut, None))]
    whole, added = (
        moments(student_PD, teacher_PD),
        sum(parts, torch.zeros(len(parts[0]), dtype=torch.float64)),
    )
    assert fvu(added) == pytest.approx(fvu(whole), rel=1e-9) and cosine(added) == pytest.approx(
        cosine(whole), rel=1e-9
    )


def test_without_variance_there_is_no_fvu():
    one_span = moments(np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]]))
    nothing = torch.zeros(6, dtype=torch.float64)
    assert math.isnan(fvu(one_span)) and math.isnan(fvu(nothing)) and cosine(nothing) == 0
