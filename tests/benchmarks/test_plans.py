"""Presets say what the plan says of them, and fit; the plan comes near what was measured."""

import re
from pathlib import Path

import pytest

from benchmarks import plans
from mtllm_engine.config import load
from tests.support.machine import ROOT

HANDBOOK = (ROOT / "configs" / "README.md").read_text()
WORST = {"seconds": 0.15, "GB at the peak": 0.05}


@pytest.mark.parametrize("path", plans.PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_gpus_and_says_how(path: Path):
    text = path.read_text()
    assert text.startswith(("# planned: not measured on such a device\n", "# measured on "))
    assert plans.COMMENT.search(text) and plans.with_comment(path) == text, (
        "run python -m benchmarks.handbook"
    )
    estimates = [plans.estimate(path, each) for each in plans.clusters(path)]
    assert all(each.fits for each in estimates)
    size = re.search(r"x(\d+)gb", path.stem)[1]
    assert {f"{each.step.cluster.gpu.gbytes:g}" for each in estimates} == {size}
    (row,) = (line for line in HANDBOOK.splitlines() if f"`{path.name}`" in line)
    assert f"| {estimates[0].bytes / 1e9:.0f} GB |" in row
    config, world_size = load(path), estimates[0].step.cluster.size
    share = -(-config.data.lanes // world_size) * config.data.pack_tokens
    assert config.memory.max_tokens <= share  # more would be room for tokens that no step has


def test_presets_are_there():
    assert {path.stem for path in plans.PRESETS} == {*plans.MACHINES}


def test_the_handbook_shows_what_the_command_prints():
    assert plans.with_example(HANDBOOK) == HANDBOOK, "run python -m benchmarks.handbook"
    assert plans.example() in HANDBOOK


def test_steps_are_predicted_as_they_were_measured():
    assert plans.OUT.read_text() == plans.table(), "run python -m benchmarks.handbook"
    errors = {words: mine / seen - 1 for words, mine, seen in plans.rows_measured()}
    kinds = {words: words.rpartition(": ")[2] for words in errors}
    judged = {words: WORST[kind] for words, kind in kinds.items() if kind in WORST}
    assert len(judged) == 4
    assert all(abs(errors[words]) < worst for words, worst in judged.items())


def test_the_reference_is_predicted_as_it_was_published():
    hours = [plans.reference_hours(recomputes=each) for each in (False, True)]
    assert 0.8 * 22 < hours[0] < 22 < hours[1] < 1.2 * 22
