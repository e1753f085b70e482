"""Exports of stacks over encoders of transformers' own classes: read where our package is not, by
us, and by the cards' programs, which are the method padded.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModel

from mtllm_engine import MTLLM
from mtllm_engine.export import export, models
from mtllm_engine.model.build import read_encoder
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.tensors import TensorFiles
from mtllm_engine.model.weights import padded_sources
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
CASES = {  # of an encoder and an LLM: how texts are read
    "e5-small llama": {"model": {"encoder_prefix": "passage: "}},
    "e5-small qwen3": {"model": {"encoder_prefix": "query: "}, "data": {"parts": "sentences"}},
    "mt5 llama": {},
    "mt5 qwen3": {"data": {"parts": "lines"}},
    "mbart-50 llama": {"data": {"truncation": "independent"}},
    "mbart-50 qwen3": {"model": {"causal": True}},
}
FILE = "model.safetensors"
WHOLE = [name for name, case in CASES.items() if "parts" not in case.get("data", {})]
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
    for name in CASES:
        kind, llm = name.split()
        if not (folder / kind).is_dir():
            build_padded_encoder(folder / kind, kind)
        if not (folder / llm).is_dir():
            build_llm(folder / llm, llm)
    build_corpus(folder / "train", 24)
    return folder


@pytest.fixture(scope="module")
def runs(land) -> dict[str, Path]:
    """Three steps of each."""
    runs = {}
    for name, case in CASES.items():
        kind, llm = name.split()
        sections = {"run": {"dir": str(land / name)}} | case
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


@pytest.mark.parametrize("name", WHOLE)
def test_the_adapters_program_gives_our_vectors(name, land, runs, ours, monkeypatch):
    out = export(runs[name], land / f"{name}-adapters", format="adapters")
    monkeypatch.chdir(out)
    kind, llm = name.split()
    program = program_of(out / "README.md").replace(f'"{kind}"', f'"../{kind}"')
    scope = run_program(program.replace(f'"{llm}"', f'"../{llm}"'))
    theirs = scope["encode"](PLAIN, *named(kind)).numpy()
    assert_same(ours[name]["plain"], theirs)


@pytest.mark.parametrize("name", WHOLE)
def test_the_clients_embeddings_give_our_vectors(name, land, runs, ours, monkeypatch):
    out = export(runs[name], land / f"{name}-llm", format="llm")
    monkeypatch.chdir(out)
    scope = run_program(program_of(out / "README.md"))
    llm = AutoModel.from_pretrained(".")
    with torch.no_grad():
        embedded = [scope["embed"](text, *named(name.split()[0])) for text in PLAIN]
        states = [llm(inputs_embeds=each[None]).last_hidden_state[0] for each in embedded]
    assert_same(ours[name]["plain"], torch.stack([each.mean(0) for each in states]).numpy())


def named(kind: str) -> list[str]:
    """What mBART calls Swahili; others are not told."""
    return ["sw_KE"] if kind.startswith("mbart") else []


def run_program(program: str) -> dict:
    scope: dict = {}
    exec(program, scope)
    return scope


def test_cards_say_which_encoder_it_is_and_how_it_reads(exported):
    cards = {name: (folder / "README.md").read_text() for name, folder in exported.items()}
    for name, encoder in (("e5-small", "BertModel"), ("mt5", "MT5EncoderModel")):
        card = cards[f"{name} llama"]
        assert card.index("\nAn encoder under an LLM") < card.index(f"transformers' {encoder}.")
        assert "`language=` may be left out" in card and 'language="' not in card
        assert "\nIt knows " in card
    card = cards["mbart-50 llama"]
    assert "transformers' MBartEncoder." in card and 'language="swh_Latn"' in card
    assert "A machine-translation encoder" in card and "It reads 52 languages" in card
    assert 'Before each text it reads "passage: ".' in cards["e5-small llama"]
    assert 'Before each sentence it reads "query: ".' in cards["e5-small qwen3"]
    front = metadata_load(exported["e5-small llama"] / "README.md")
    assert "swh" in front["language"] and len(front["language"]) > 90


def test_a_default_language_is_one_that_the_encoder_can_be_given(land, runs):
    out = export(runs["mt5 llama"], land / "default", default_language="nqo_Nkoo")
    assert json.loads((out / "config.json").read_text())["default_language"] == "nqo_Nkoo"
    with pytest.raises(ValueError, match="the encoder has no token for nqo_Nkoo"):
        export(runs["mbart-50 llama"], land / "none", default_language="nqo_Nkoo")


def test_merged_adapters_leave_the_vectors_where_they_were(land, runs, ours):
    name = "e5-small qwen3"
    after = MTLLM.from_pretrained(export(runs[name], land / "merged", merge=True))
    assert_same(ours[name]["untold"], after.encode(TEXTS))


def test_the_authors_layout_is_refused_by_name(land, runs):
    with pytest.raises(ValueError, match="the authors' layout has no place for a mt5 encoder"):
        export(runs["mt5 llama"], land / "none", format="authors")
    assert not (land / "none").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_encoder_alone_and_to_the_bit(kind, land, exported, tmp_path):
    """Whatever a checkpoint holds besides: a decoder, a head, a pooler."""
    trained = find_trained(exported["mt5 llama"])
    source = build_padded_encoder(tmp_path / "source", kind)
    model = replace(trained.config.model, encoder=str(source))
    trained = replace(trained, config=replace(trained.config, model=model))
    models.write_encoder(trained, tmp_path / "alone", "")
    loaded, report = opener(tmp_path / "alone")(output_loading_info=True)
    assert not any(report.values())
    theirs = read_by_transformers(source, kind)
    opened = loaded.encoder if "t5" in kind or "madlad" in kind else loaded
    expected = {**theirs.state_dict(), **dict(theirs.named_buffers())}
    found = {**opened.state_dict(), **dict(opened.named_buffers())}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    # As that class would have written it.
    loaded.save_pretrained(tmp_path / "saved")
    written, saved = (load_file(tmp_path / each / FILE) for each in ("alone", "saved"))
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], each) for name, each in saved.items())
    # We read it, too.
    encoder = PaddedEncoder(read_encoder(tmp_path / "alone"), torch.float32)
    sources = padded_sources(TensorFiles(tmp_path / "alone"), encoder)
    assert {name for each in sources.values() for name in each.names} == written.keys()


def opener(folder: Path) -> Callable:
    """Of the class that config.json names."""
    config = json.loads((folder / "config.json").read_text())
    (name,), family = config["architectures"], config["model_type"].replace("-", "_")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, name)
    has_pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    return partial(kind.from_pretrained, folder, **options)
