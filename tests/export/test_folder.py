"""The self-contained folder: what transformers makes of it where our package is not, and what ours
does; what is in it, and what is refused.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from mtllm_engine import MTLLM
from mtllm_engine.export import export
from mtllm_engine.languages import FLORES_200
from mtllm_engine.training.trained import find_trained
from tests.support.exported import AWKWARD, run_without_us, write_stack, write_task
from tests.support.tiny import build_decoder, build_encoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "plain": {},
    "causal": {"bias": False, "model": {"causal": True}},
    "taught": {"has_task": True, "languages": {"fallback": {"min_Arab": "ind_Latn"}}},
    "taught-causal": {"has_task": True, "bias": False, "model": {"causal": True}},
    "lines": {"data": {"parts": "lines"}},
    "sentences": {"bias": False, "model": {"causal": True}, "data": {"parts": "sentences"}},
    "independent": {"data": {"truncation": "independent"}},
}
TEXTS = [*AWKWARD, *texts(8, seed=3)]
PAIRS = [
    ("a premise of a few words " * 9, "and what follows"),
    ("short", "shorter"),
    ("", "x " * 20),
]
READ = """
from transformers import AutoModel
for name, job in jobs["cases"].items():
    model = AutoModel.from_pretrained(job["folder"], trust_remote_code=True)
    for key, options in job["asked"].items():
        results[f"{name}/{key}"] = model.encode(**options)
    for key, options in job["classified"].items():
        results[f"{name}/{key}"] = model.classify(**options).probabilities
"""


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("land")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    (folder / "train").mkdir()
    return folder


@pytest.fixture(scope="module")
def stacks(land) -> dict[str, Path]:
    return {
        name: write_stack(land, name, seed=number, **case)
        for number, (name, case) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def exported(land, stacks) -> dict[str, Path]:
    tasks = {"topic": write_task(land / "topic", 3), "nli": write_task(land / "two", 3, seed=6)}
    return {
        name: export(stack, land / f"{name}-out", tasks=tasks if name == "plain" else None)
        for name, stack in stacks.items()
    }


def asked_of(name: str) -> dict[str, dict]:
    languages = ["swh_Latn", "sat_Olck", "zho_Hans"]
    mixed = [languages[number % 3] for number in range(len(TEXTS))]
    asked = {
        "mixed": {"texts": TEXTS, "language": mixed},
        "alone": {"texts": TEXTS[:1], "language": "swh_Latn"},
        "teacher": {"texts": TEXTS, "reader": "teacher"},
        "normal": {"texts": TEXTS[:3], "language": "swh_Latn", "normalize": True},
    }
    if name == "plain":
        # NLLB's vocabulary lacks these two.
        known = [code for code in FLORES_200 if code not in ("arb_Latn", "min_Arab")]
        asked["every"] = {"texts": ["a text"] * len(known), "language": known}
        asked["nothing"] = {"texts": [], "language": "swh_Latn"}
    if name == "taught":
        asked["fallback"] = {"texts": TEXTS[:2], "language": "min_Arab"}
    return asked


def classified_of(name: str) -> dict[str, dict]:
    shared = {"texts": [*TEXTS, *PAIRS], "language": "swh_Latn"}
    tasks = {"plain": ["topic", "nli"], "taught": [""]}.get(name, [])
    return {f"task {task}": shared | {"task": task} for task in tasks}


def ours(model: MTLLM, name: str) -> dict[str, np.ndarray]:
    vectors = {key: model.encode(**options) for key, options in asked_of(name).items()}
    answers = {
        key: model.classify(**options).probabilities for key, options in classified_of(name).items()
    }
    return vectors | answers


@pytest.fixture(scope="module")
def read_elsewhere(land, exported) -> dict[str, np.ndarray]:
    """What transformers makes of every folder, in a process without our package."""
    cases = {
        name: {
            "folder": str(folder),
            "asked": asked_of(name),
            "classified": classified_of(name),
        }
        for name, folder in exported.items()
    }
    return run_without_us(READ, land, cases=cases)


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_our_vectors_and_answers(name, stacks, land, read_elsewhere):
    model = MTLLM.from_pretrained(stacks[name])
    if name == "plain":
        model.add_task("topic", land / "topic")
        model.add_task("nli", land / "two")
    expected = ours(model, name)
    assert len({row.tobytes() for row in expected["mixed"].round(3)}) > 10
    for key, array in expected.items():
        theirs = read_elsewhere[f"{name}/{key}"]
        assert theirs.dtype == np.float32 and theirs.shape == array.shape
        if array.size:
            assert np.abs(theirs - array).max() <= 1e-5 * np.abs(array).max(), key


@pytest.mark.parametrize("name", CASES)
def test_we_read_the_folder_as_we_read_what_was_trained(name, stacks, exported):
    asked = {key: each for key, each in asked_of(name).items() if key != "every"}
    before, after = (MTLLM.from_pretrained(each[name]) for each in (stacks, exported))
    for options in asked.values():
        assert np.array_equal(before.encode(**options), after.encode(**options))
    assert after.languages == before.languages
    trained = after.trained
    assert trained.is_exported and not trained.is_merged
    if name == "taught":
        texts = classified_of(name)["task "]
        assert np.array_equal(*(each.classify(**texts).probabilities for each in (before, after)))
    if name == "plain":
        assert list(after.tasks) == ["topic", "nli"]
