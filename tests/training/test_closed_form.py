"""The projection's start in closed form: NumPy's least squares on the pairs that Hugging Face's
models give.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaForCausalLM, M2M100ForConditionalGeneration

from mtllm_engine.config import Config, ObjectiveConfig
from mtllm_engine.data.annotations import NO_ANNOTATIONS, partners
from mtllm_engine.data.stream import build_stream
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.train import start_projection, train
from mtllm_engine.training.closed_form import fit_projection, read_pairs, solve
from tests.support.tiny import (
    build_config,
    build_corpus,
    build_decoder,
    build_encoder,
    build_lines,
    build_world,
    pack_lines,
    texts,
)

WORLD = build_world()
NUM_TEXTS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("closed_form")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    pack_lines(folder / "train", texts(NUM_TEXTS), num_shards=3)
    build_lines(folder / "lines", NUM_TEXTS)
    build_corpus(folder / "validation", 30, seed=1)
    return folder


def configure(folder: Path, *, bias: bool = True, **sections) -> Config:
    paths = {side: str(folder / side) for side in ("encoder", "decoder")}
    model = {
        **paths,
        "dtype": "float32",
        "projection_init": "least_squares",
        "projection_bias": bias,
    }
    return build_config(folder, **{"model": model, "zero": {"stage": 0}} | sections)


def fit(config: Config):
    stack, weights = build_stack(config)
    return fit_projection(config, WORLD, stack, weights, build_tokenizer(config, stack))


def pairs_of(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """All pairs that a fit reads, fp64."""
    stack, weights = build_stack(config)
    stream = build_stream(config.data, build_tokenizer(config, stack), WORLD, seed=0, aligns=True)
    states, embeddings = zip(*read_pairs(config, WORLD, stack, weights, stream))
    stream.close()
    return torch.cat(states).double().numpy(), torch.cat(embeddings).double().numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_a_fit_is_numpys_least_squares_on_the_same_pairs(folder: Path, bias: bool):
    config = configure(folder, bias=bias)
    states_SE, embeddings_SD = pairs_of(config)
    fitted = fit(config)
    means = [
        each.mean(0) if bias else np.zeros(each.shape[1]) for each in (states_SE, embeddings_SD)
    ]
    # Normed states lie in a hyperplane up to the rounding of fp32, which a fit must not make
    # something of: hence rcond.
    expected_ED, *_ = np.linalg.lstsq(states_SE - means[0], embeddings_SD - means[1], rcond=1e-5)
    np.testing.assert_allclose(
        fitted.weight_DE.numpy(), expected_ED.T, rtol=0, atol=1e-6 * abs(expected_ED).max()
    )
    assert fitted.num_pairs == len(states_SE) > 200 and fitted.num_singular == bias
    if bias:
        expected_D = means[1] - means[0] @ expected_ED
        np.testing.assert_allclose(
            fitted.bias_D.numpy(), expected_D, rtol=0, atol=1e-6 * abs(expected_D).max()
        )
    else:
        assert fitted.bias_D is None and fitted.values.keys() == {"projection.weight"}


def test_a_stack_that_learns_labels_starts_as_one_that_distils(folder: Path):
    """Nobody reads the LLM's tokens then, and the fit needs them all the same."""
    config = configure(folder)
    stack, weights = build_stack(config)
    learning = replace(config, objective=ObjectiveConfig(kind="finetune", reader="stack"))
    fitted = fit_projection(learning, WORLD, stack, weights, build_tokenizer(learning, stack))
    assert fitted.values["projection.weight"].equal(fit(config).values["projection.weight"])


@pytest.mark.parametrize("parts", ["whole", "sentences"])
def test_pairs_are_hugging_faces_states_and_embeddings_of_aligned_tokens(folder: Path, parts: str):
    """What stands between parts is no pair."""
    config = configure(folder, data={"train": str(folder / "lines"), "parts": parts})
    tokenizer = build_tokenizer(config, build_stack(config)[0])
    encoder = M2M100ForConditionalGeneration.from_pretrained(
        folder / "encoder"
    ).model.encoder.eval()
    table = (
        LlamaForCausalLM.from_pretrained(folder / "decoder").get_input_embeddings().weight.detach()
    )
    expected = []
    for line in (folder / "lines.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        student, teacher = tokenizer.example(text, "eng_Latn", NO_ANNOTATIONS)
        aligned_S = partners(text, student.offsets_S2, teacher.offsets_S2)
        states_SE = torch.full((len(student.ids_S), 32), torch.nan)
        for start, end in [[0, len(student.ids_S)]] if parts == "whole" else student.parts_Q2:
            with torch.no_grad():
                ids_BL = torch.tensor(student.ids_S[None, start:end]).long()
                states_SE[start:end] = encoder(ids_BL).last_hidden_state[0]
        indices = np.flatnonzero(aligned_S >= 0)
        embeddings = table[torch.tensor(teacher.ids_S[aligned_S[indices]]).long()]
        expected.append(torch.cat([states_SE[indices], embeddings], dim=1))
    # Three steps of 16 documents read each of the 40 once, and 8 of them once more.
    pairs, expected = (
        torch.tensor(np.concatenate(pairs_of(config), axis=1)),
        torch.cat(expected).double(),
    )
    assert len(expected) < len(pairs) < 1.5 * len(expected)
    distances = torch.cdist(pairs, expected)
    assert (
        max(distances.min(0).values.max(), distances.min(1).values.max())
        < 1e-4 * expected.abs().max()
    )


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_solve_on_sizes_of_any_kind(width: int, out_width: int, count: int, bias: bool, seed: int):
    """Fewer pairs than directions too: of all exact solutions the smallest."""
    generator = torch.Generator().manual_seed(seed)
    x_SE = torch.randn(count, width, generator=generator, dtype=torch.float64) + 1
    x_SE[:, 0] = x_SE[:, -1]
    y_SD = torch.randn(count, out_width, generator=generator, dtype=torch.float64)
    inputs_SE = functional.pad(x_SE, (0, 1), value=1.0)
    solution = solve(inputs_SE.T @ torch.cat([inputs_SE, y_SD], dim=1), bias=bias)
    means = [each.mean(0) if bias else each.new_zeros(each.shape[1]) for each in (x_SE, y_SD)]
    expected_ED = np.linalg.lstsq((x_SE - means[0]).numpy(), (y_SD - means[1]).numpy(), rcond=1e-5)[
        0
    ]
    assert np.allclose(
        solution.weight_DE.T.numpy(),
        expected_ED,
        rtol=0,
        atol=1e-5 * max(1, abs(expected_ED).max()),
    )
    assert (solution.bias_D is not None) == bias


def test_no_pair_at_all_is_one_line():
    with pytest.raises(
        ValueError, match="no token of the documents is one for both tokenizers; set model"
    ):
        solve(torch.zeros(4, 6, dtype=torch.float64), bias=True)


def test_documents_are_the_first_that_training_reads_and_no_more_than_asked_for(
    folder: Path, monkeypatch
):
    config = configure(folder)
    whole = fit(config).num_pairs
    monkeypatch.setattr("mtllm_engine.training.closed_form.NUM_DOCUMENTS", 16)
    first = fit(config)
    assert 0 < first.num_pairs < whole / 2
    stored = replace(config, data=replace(config.data, teacher_states="of-another-run"))
    assert torch.equal(fit(stored).weight_DE, first.weight_DE)  # stored targets have no part in it


def start(config: Config):
    stack, weights = build_stack(config)
    return start_projection(config, WORLD, stack, weights, build_tokenizer(config, stack))


def test_training_starts_from_the_fit_and_solves_neither_on_resume_nor_from_a_start(
    folder: Path, capsys
):
    config = configure(folder, run={"dir": str(folder / "resumed")}, optim={"steps": 1, "lr": 1e-9})
    assert start(config) is not None
    train(config, WORLD)
    assert "projection  least squares over" in capsys.readouterr().out
    saved = folder / "resumed" / "checkpoints" / "latest"
    weight_DE = load_file(saved / "projection.safetensors")["weight"]
    torch.testing.assert_close(weight_DE, fit(config).weight_DE, rtol=0, atol=1e-7)
    assert start(config) is None
    another = replace(config, run=replace(config.run, dir=str(folder / "started")))
    assert start(replace(another, model=replace(config.model, init_from=(str(saved),)))) is None
    assert start(replace(another, model=replace(config.model, projection_init="embedding"))) is None
    assert start(another) is not None
