"""Exports of what stands on merged adapters: wherever the LLM's weights are written they are those
of the chain, and where they are not it is said how to make them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mtllm_engine.export import Options, adapters, authors, folder, llm
from mtllm_engine.model.merge import open_decoder
from mtllm_engine.model.peft import read_chain
from mtllm_engine.training.trained import Trained, find_trained
from tests.support.adapters import make_adapters
from tests.support.exports import (
    AS_STORED,
    TEXTS,
    assert_same,
    build_trained,
    our_vectors,
    program_of,
    run_alone,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CHAIN = ("mntp", "simcse")
LANGUAGE = "swh_Latn"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """On adapters of the LLM, then of a model for words."""
    place = tmp_path_factory.mktemp("chain")
    trained = build_trained(place, bias=False, causal=False)
    for number, name in enumerate(CHAIN):
        words = LlamaForCausalLM.from_pretrained(trained.config.model.decoder)
        keys = {"target_modules": ["v_proj", "up_proj"], "r": 2, "lora_alpha": 3}
        make_adapters(words if number else words.model, place / name, seed=number, **keys)
    chain = tuple(str(place / name) for name in CHAIN)
    model = replace(trained.config.model, adapters=chain)
    return replace(trained, config=replace(trained.config, model=model))


@pytest.fixture(scope="module")
def vectors(trained: Trained) -> np.ndarray:
    """Which are others than those without the chain."""
    vectors_ND = our_vectors(trained, TEXTS, LANGUAGE)
    model = replace(trained.config.model, adapters=())
    bare = replace(trained, config=replace(trained.config, model=model))
    assert np.abs(our_vectors(bare, TEXTS, LANGUAGE) - vectors_ND).max() > 1e-3
    return vectors_ND


def test_the_folder_holds_the_merged_llm(trained, vectors, tmp_path: Path):
    out = tmp_path / "out"
    folder.write(trained, out, AS_STORED)
    found = find_trained(out)
    assert found.config.model.adapters == ()
    found = replace(found, config=replace(found.config, zero=trained.config.zero))
    assert_same(vectors, our_vectors(found, TEXTS, LANGUAGE))
    assert read_chain(out / "student") == CHAIN
    card = (out / "README.md").read_text()
    assert "The LLM is decoder with the adapters mntp and then simcse merged into it." in card
    assert "- mntp: **unknown**" in card and str(tmp_path.parent) not in card
    record = json.loads((out / "mtllm.json").read_text())
    assert record["about"]["adapters"] == list(CHAIN) and record["identity"]["model.adapters"]


def test_weights_are_written_as_they_were_in_training(trained: Trained, tmp_path: Path):
    for kept, dtype in (("bfloat16", ""), ("float32", ""), ("float32", "bfloat16")):
        model = replace(trained.config.model, dtype=kept)
        out = tmp_path / f"{kept}-{dtype}"
        folder.write(
            replace(trained, config=replace(trained.config, model=model)), out, Options(dtype=dtype)
        )
        written = load_file(out / "llm" / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        merged = open_decoder(model).read(name, 0, written[name].numel()).view(written[name].shape)
        expected = getattr(torch, dtype or kept)
        assert written[name].dtype == expected and torch.equal(written[name], merged.to(expected))
        config = json.loads((out / "llm" / "config.json").read_text())
        assert config["dtype"] == (dtype or kept)


def test_the_adapters_card_merges_the_chain_first(trained, vectors, tmp_path: Path):
    out = Path(trained.config.model.decoder).with_name("exported")
    out.mkdir()
    adapters.write(trained, out, AS_STORED)
    assert read_chain(out) == CHAIN
    program = program_of(out / "README.md").replace('"."', '"exported"')
    asking = f"encode({TEXTS!r}, {LANGUAGE!r}).numpy()"
    program += f"import numpy\nnumpy.save('theirs.npy', {asking})\n"
    run_alone(program, out.parent)
    assert_same(vectors, np.load(out.parent / "theirs.npy"))


def test_the_other_formats_merge_both(trained: Trained, tmp_path: Path):
    for write, prefix in ((llm.write, ""), (authors.write, "llm2vec.")):
        out = tmp_path / (prefix or "llm")
        out.mkdir()
        write(trained, out, AS_STORED)
        written = load_file(out / "model.safetensors")
        student = load_file(trained.student / "adapter_model.safetensors")
        merged = open_decoder(trained.config.model)
        name = "layers.1.mlp.up_proj"
        saved = f"base_model.model.{name}.lora"
        b_FR, a_RD = student[f"{saved}_B.weight"], student[f"{saved}_A.weight"]
        ours = written[f"{prefix}{name}.weight"]
        base = merged.read(f"model.{name}.weight", 0, ours.numel()).view(ours.shape)
        expected = base + trained.config.lora.scale * b_FR @ a_RD
        torch.testing.assert_close(ours, expected)
        assert "with the adapters mntp and then simcse" in (out / "README.md").read_text()
