"""Exports of stacks over encoders of transformers' own classes: read where our package is not, by us,
and by the cards' programs, which are the method padded.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.mbart.modeling_mbart import MBartEncoder

import transformers
from mtllm_engine import MTLLM, files
from mtllm_engine.export import export
from mtllm_engine.train import train
from mtllm_engine.training.trained import find_trained
from tests.support.encoders import KINDS, LONGEST, build_padded_encoder, read_by_transformers
from tests.support.exported import AWKWARD, run_without_us
from tests.support.exports import assert_same, program_of
from tests.support.families import build_llm
from tests.support.stages import ALONE, stage1_config
from tests.support.tiny import build_corpus, texts

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [*AWKWARD, *texts(6, seed=3)]
PLAIN = ["a", "return self", "if the seed is", *texts(5, seed=4, longest=2)]
"""Without control tokens, and short enough that nothing is cut."""
LLMS = ("llama", "qwen3")
ENCODERS = {  # and how texts are read
    "e5-small": {"model": {"encoder_prefix": "passage: "}},
    "mt5": {"data": {"parts": "sentences"}},
    "mbart-50": {"data": {"truncation": "independent"}},
}
CASES = [f"{kind} {llm}" for kind in ENCODERS for llm in LLMS]
READ = """
from transformers import AutoModel

for name, job in jobs["cases"].items():
    model = AutoModel.from_pretrained(job["folder"], trust_remote_code=True)
    for key, options in job["asked"].items():
        results[f"{name}/{key}"] = model.encode(**options)
    try:
        model.encode(["a"], "swahili")
    except ValueError as error:
        results[f"{name}/refused"] = str(error)
"""


def asked_of(name: str) -> dict[str, dict]:
    languages = ["swh_Latn", "eng_Latn", "zho_Hans"]
    mixed = [languages[number % 3] for number in range(len(TEXTS))]
    asked = {
        "mixed": {"texts": TEXTS, "language": mixed},
        "alone": {"texts": TEXTS[3:4], "language": "swh_Latn"},
        "teacher": {"texts": TEXTS, "reader": "teacher"},
    }
    if not name.startswith("mbart"):
        asked["untold"] = {"texts": TEXTS}
        asked["unknown"] = {"texts": TEXTS, "language": "nqo_Nkoo"}
    return asked


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("land")
    for kind in ENCODERS:
        build_padded_encoder(folder / kind, kind)
    for llm in LLMS:
        build_llm(folder / llm, llm)
    build_corpus(folder / "train", 24)
    return folder


@pytest.fixture(scope="module")
def runs(land) -> dict[str, Path]:
    """Three steps of each."""
    runs = {}
    for name in CASES:
        kind, llm = name.split()
        sections = {"run": {"dir": str(land / name)}} | ENCODERS[kind]
        models = {"encoder": str(land / kind), "decoder": str(land / llm)}
        sections["model"] = models | sections.get("model", {})
        sections["data"] = {"max_length": LONGEST, "lanes": 4} | sections.get("data", {})
        train(stage1_config(land, **sections), ALONE)
        runs[name] = land / name
    return runs


@pytest.fixture(scope="module")
def exported(land, runs) -> dict[str, Path]:
    return {name: export(run, land / f"{name}-out") for name, run in runs.items()}


@pytest.fixture(scope="module")
def ours(runs) -> dict[str, dict[str, np.ndarray]]:
    vectors = {}
    for name, run in runs.items():
        model = MTLLM.from_pretrained(run)
        vectors[name] = {key: model.encode(**options) for key, options in asked_of(name).items()}
        num_cut = model.cut
        vectors[name]["plain"] = model.encode(PLAIN, "swh_Latn")
        assert model.cut == num_cut
    return vectors


@pytest.fixture(scope="module")
def read_elsewhere(land, exported) -> dict[str, np.ndarray]:
    cases = {
        name: {"folder": str(folder), "asked": asked_of(name)} for name, folder in exported.items()
    }
    return run_without_us(READ, land, cases=cases)


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_our_vectors(name, ours, read_elsewhere):
    assert len({row.tobytes() for row in ours[name]["mixed"].round(3)}) > 8
    for key in asked_of(name):
        assert_same(ours[name][key], read_elsewhere[f"{name}/{key}"])
    if name.startswith("mbart"):
        assert str(read_elsewhere[f"{name}/refused"]).startswith("unknown language 'swahili'")


@pytest.mark.parametrize("name", CASES)
def test_we_read_the_folder_as_we_read_what_was_trained(name, runs, exported, ours):
    after = MTLLM.from_pretrained(exported[name])
    for key, options in asked_of(name).items():
        assert np.array_equal(ours[name][key], after.encode(**options)), key
    assert after.languages == MTLLM.from_pretrained(runs[name]).languages


@pytest.mark.parametrize("name", [name for name in CASES if "mt5" not in name])  # which has parts
def test_the_adapters_program_gives_our_vectors(name, land, runs, ours, monkeypatch):
    out = export(runs[name], land / f"{name}-adapters", format="adapters")
    monkeypatch.chdir(out)
    kind, llm = name.split()
    program = program_of(out / "README.md").replace(f'"{kind}"', f'"../{kind}"')
    scope = run_program(program.replace(f'"{llm}"', f'"../{llm}"'))
    theirs = scope["encode"](PLAIN, *named(kind)).numpy()
    assert_same(ours[name]["plain"], theirs)


@pytest.mark.parametrize("name", [name for name in CASES if "mt5" not in name])
def test_the_clients_embeddings_give_our_vectors(name, land, runs, ours, monkeypatch):
    out = export(runs[name], land / f"{name}-llm", format="llm")
    monkeypatch.chdir(out)
    scope = run_program(program_of(out / "README.md"))
    llm = transformers.AutoModel.from_pretrained(".")
    rows = []
    for text in PLAIN:
        embedded = scope["embed"](text, *named(name.split()[0]))
        with torch.no_grad():
            rows.append(llm(inputs_embeds=embedded[None]).last_hidden_state[0].mean(0))
    assert_same(ours[name]["plain"], torch.stack(rows).numpy())


def named(kind: str) -> list[str]:
    """What mBART calls Swahili; others are not told."""
    return ["sw_KE"] if kind.startswith("mbart") else []


def run_program(program: str) -> dict:
    scope: dict = {}
    exec(program, scope)
    return scope
