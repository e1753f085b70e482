"""The learning rate's course over a run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.config import OptimConfig
from mtllm_engine.training.step import learning_rate

SCHEDULE = st.builds(
    OptimConfig,
    steps=st.integers(1, 400),
    lr=st.floats(1e-6, 1),
    warmup_ratio=st.floats(0, 1, exclude_max=True),
)


@given(SCHEDULE)
def test_learning_rate_goes_linearly_from_zero_to_its_peak_and_back(optim):
    """Neither zero is a step's: all steps train."""
    rates = [learning_rate(optim, step) for step in range(optim.steps)]
    warmup = round(optim.warmup_ratio * optim.steps)
    rising, falling = [0.0, *rates[:warmup]], [*rates[warmup:], 0.0]
    assert rising == pytest.approx(np.linspace(0, optim.lr, warmup + 1) if warmup else [0.0])
    assert falling == pytest.approx(
        np.linspace(optim.lr, 0, len(falling)) if falling[1:] else [0.0]
    )
    assert min(rates) > 0


def test_learning_rate_of_the_papers_run():
    """10 000 steps, 1 % warm-up to 2e-4, then linearly to 0 (arXiv 2406.12739)."""
    optim = OptimConfig(steps=10_000, lr=2e-4, warmup_ratio=0.01)
    rates = [learning_rate(optim, step) for step in (0, 49, 99, 100, 5050, 9999)]
    assert rates == pytest.approx([2e-6, 1e-4, 2e-4, 2e-4, 1e-4, 2e-4 / 9900])
