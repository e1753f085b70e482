"""The authors' layout: what it holds gives our vectors, and becomes adapters again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaModel
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_engine import cli
from mtllm_engine.export import authors, export
from mtllm_engine.files import unsealed
from mtllm_engine.model.tensors import fingerprint
from mtllm_engine.training.trained import Trained, find_trained
from tests.support.exports import (
    AS_STORED,
    LANGUAGES,
    TEXTS,
    assert_same,
    build_trained,
    our_vectors,
    read_trained,
)
from tests.support.tiny import build_decoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return build_trained(tmp_path_factory.mktemp("models"), bias=False, causal=False)


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    out = trained.student.parent / "authors"
    out.mkdir()
    authors.write(trained, out, AS_STORED)
    return out


def bring_in(exported: Path, trained: Trained, out: Path, rank: int = 4) -> int:
    arguments = ["--base", trained.config.model.decoder, "--out", str(out), "--rank", str(rank)]
    return cli.main(["models", "import", str(exported), *arguments])


def test_its_parts_are_transformers_own_models(trained: Trained, exported: Path):
    tensors = load_file(exported / "model.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, own = name.partition(".")
        parts.setdefault(prefix, {})[own] = tensor
    config = json.loads((exported / "config.json").read_text())
    encoder = M2M100Encoder.from_pretrained(trained.config.model.encoder)
    llm = LlamaModel.from_pretrained(trained.config.model.decoder)
    assert parts["nllb_encoder"].keys() == encoder.state_dict().keys()
    assert parts["llm2vec"].keys() == llm.state_dict().keys()
    assert parts.keys() == {"nllb_encoder", "llm2vec", "up_proj"}
    assert parts["up_proj"]["weight"].shape == (32, 16)
    assert config["nllb_config"]["d_model"] == 16
    assert config["llm2vec_config"]["hidden_size"] == 32
    assert str(trained.student.parent) not in (exported / "config.json").read_text()


def test_the_command_writes_the_same(trained, exported, tmp_path):
    models = trained.config.model
    options = {"encoder": models.encoder, "decoder": models.decoder}
    out = export(trained.student, tmp_path / "out", format="authors", **options)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (exported / name).read_bytes()
    assert unsealed((out / "export.json").read_bytes())["format"] == "authors"


def test_out_and_in_again_gives_the_same_vectors(trained, exported, tmp_path, capsys):
    assert bring_in(exported, trained, tmp_path / "in") == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert len(told) == 8 and all(float(share) < 1e-5 for share in told.values())
    models = {key: getattr(trained.config.model, key) for key in ("encoder", "decoder")}
    found = find_trained(tmp_path / "in", **models)
    assert not found.config.model.projection_bias and not found.config.model.causal
    assert found.record["identity"]["model.decoder"] == fingerprint(Path(models["decoder"]))
    again = read_trained(trained.student.parent, tmp_path / "in", bias=False, causal=False)
    for language in LANGUAGES:
        ours_ND, theirs_ND = (our_vectors(each, TEXTS, language) for each in (trained, again))
        assert_same(ours_ND, theirs_ND, 1e-4)


def test_of_a_lower_rank_something_is_left_out(trained, exported, tmp_path, capsys):
    assert bring_in(exported, trained, tmp_path / "in", rank=2) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    base, merged = (
        load_file(path / "model.safetensors")
        for path in (Path(trained.config.model.decoder), exported)
    )
    left = whole = 0.0
    for layer in range(2):
        name = f"layers.{layer}.mlp.up_proj.weight"
        singular = torch.linalg.svdvals(merged[f"llm2vec.{name}"] - base[f"model.{name}"])
        left, whole = left + singular[2:].square().sum(), whole + singular.square().sum()
    assert float(told["up_proj"]) == pytest.approx((left / whole).sqrt().item(), rel=1e-2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 6))
def test_factors_give_back_what_has_their_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    b_FR, a_RD = (
        torch.randn(*each, generator=generator) for each in ((rows, rank), (rank, columns))
    )
    again = authors._factors(b_FR @ a_RD, rank)
    assert again[0].shape == b_FR.shape and again[1].shape == a_RD.shape
    torch.testing.assert_close(again[0] @ again[1], b_FR @ a_RD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "changed", "named"),
    [
        ("model", {"causal": True}, "model.causal=true"),
        ("data", {"parts": "lines"}, "data.parts=lines"),
    ],
)
def test_what_has_no_place_is_refused_by_name(trained, tmp_path, section, changed, named):
    part = replace(getattr(trained.config, section), **changed)
    other = replace(trained, config=replace(trained.config, **{section: part}))
    with pytest.raises(ValueError, match=f"no place for {named}"):
        authors.write(other, tmp_path, AS_STORED)


def test_a_projection_with_a_bias_is_refused_by_name(trained, tmp_path):
    other = build_trained(trained.student.parent, bias=True, causal=False)
    with pytest.raises(ValueError, match="no place for model.projection_bias=true"):
        authors.write(other, tmp_path, AS_STORED)


def test_without_the_base_it_is_refused_with_the_reason(exported, tmp_path, capsys):
    assert cli.main(["models", "import", str(exported), "--out", str(tmp_path / "in")]) == 1
    assert "their student is not its teacher" in capsys.readouterr().err
    assert not (tmp_path / "in").exists()


def test_another_base_is_refused_by_its_tensor(trained, exported, tmp_path, capsys):
    other = tmp_path / "decoder"
    llm = LlamaModel.from_pretrained(trained.config.model.decoder)
    with torch.no_grad():
        llm.layers[1].input_layernorm.weight += 1
    llm.save_pretrained(other)
    arguments = ["--base", str(other), "--out", str(tmp_path / "in")]
    assert cli.main(["models", "import", str(exported), *arguments]) == 1
    assert "layers.1.input_layernorm.weight differs" in capsys.readouterr().err


def test_a_base_of_another_size_is_refused_by_its_tensor(trained, exported, tmp_path, capsys):
    build_decoder(tmp_path / "decoder", width=48, layers=1)
    arguments = ["--base", str(tmp_path / "decoder"), "--out", str(tmp_path / "in")]
    assert cli.main(["models", "import", str(exported), *arguments]) == 1
    assert "has shape (48,), theirs (32,)" in capsys.readouterr().err


def test_a_tensor_that_is_not_there_is_named(trained, exported, tmp_path, capsys):
    tensors = load_file(exported / "model.safetensors")
    del tensors["up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert bring_in(tmp_path, trained, tmp_path / "in") == 1
    assert "has no tensor up_proj.weight" in capsys.readouterr().err
