"""Names that become files and folders: one component of a path, whatever a key says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine.config import TAKEN, from_dict
from mtllm_engine.files import is_name

SMALLEST = {
    "run": {"dir": "runs/a"},
    "model": {"encoder": "nllb", "decoder": "llama"},
    "data": {"train": ["fineweb"], "pack_documents": 4},
    "optim": {"steps": 10},
}
KEYS = {
    "data.teacher_states": lambda name: name,
    "evaluate.stack_name": lambda name: name,
    "evaluate.languages": lambda name: ["swh_Latn", name],
    "probe.split": lambda name: name,
}
HOSTILE = [
    "..",
    ".",
    "../../x",
    "/x",
    "a/../b",
    "a b",
    "a\nb",
    "a\x00b",
    "-rf",
    ".x",
    "~",
    "é/",
    "x" * 201,
]


def config_with(key: str, value: object):
    section, _, name = key.partition(".")
    return from_dict(SMALLEST | {section: SMALLEST.get(section, {}) | {name: value}})


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_names_a_folder_takes_no_path(key: str, name: str):
    with pytest.raises(ValueError) as error:
        config_with(key, KEYS[key](name))
    assert str(error.value).startswith(f"{key}: {name!r} is no") and "\n" not in str(error.value)


@given(st.text(max_size=8) | st.lists(st.sampled_from("./\\ab~\n"), max_size=6).map("".join))
def test_a_name_is_one_component_of_a_path_and_stays_below_its_folder(name: str):
    if is_name(name):
        path = Path("/results") / name
        assert path.parts == ("/", "results", name) and not name.startswith(".")
        assert name.strip() == name and "\x00" not in name


@pytest.mark.parametrize("name", TAKEN)
def test_the_stack_takes_no_name_of_anything_else_in_the_results(name: str):
    message = f"^evaluate.stack_name: '{name}' is the name of something else in the results"
    with pytest.raises(ValueError, match=message):
        config_with("evaluate.stack_name", name)
