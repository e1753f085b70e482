"""PEFT's folder: what its card tells a peer to do gives our vectors."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from mtllm_engine.export import adapters
from mtllm_engine.training.trained import find_trained
from tests.support.adapters import write_head
from tests.support.exports import (
    AS_STORED,
    LANGUAGES,
    TEXTS,
    assert_same,
    build_trained,
    our_vectors,
    program_of,
    run_alone,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("causal", [False, True])
def test_an_export_says_how_texts_are_read(tmp_path, causal: bool):
    trained, out = build_trained(tmp_path, bias=True, causal=causal), tmp_path / "out"
    out.mkdir()
    adapters.write(trained, out, AS_STORED)
    model = trained.config.model
    places = {"encoder": model.encoder, "decoder": model.decoder}
    again = find_trained(out, **places).config
    assert (again.model.causal, again.data.max_length) == (causal, trained.config.data.max_length)


def test_the_cards_program_gives_our_vectors(tmp_path):
    stacks, program = {}, ""
    for causal in (False, True):
        out = tmp_path / f"causal-{causal}"
        out.mkdir()
        stacks[out] = trained = build_trained(tmp_path, bias=not causal, causal=causal)
        adapters.write(trained, out, AS_STORED)
        program += program_of(out / "README.md").replace('"."', f'"{out.name}"')
        asking = f"[encode({TEXTS!r}, each).numpy() for each in {LANGUAGES!r}]"
        program += f"import numpy\nnumpy.save('{out.name}/theirs.npy', {asking})\n"
    run_alone(program, tmp_path)
    for out, trained in stacks.items():
        for language, theirs_ND in zip(LANGUAGES, np.load(out / "theirs.npy")):
            assert_same(our_vectors(trained, TEXTS, language), theirs_ND)


def test_the_card_says_what_else_there_is(tmp_path):
    trained = build_trained(tmp_path, bias=True, causal=False)
    write_head(trained.student, 7, 32)
    model = replace(trained.config.model, quantization="nf4")
    config = replace(trained.config, model=model, data=replace(trained.config.data, parts="lines"))
    out = tmp_path / "out"
    out.mkdir()
    adapters.write(replace(trained, task="sib200", config=config), out, AS_STORED)
    card = (out / "README.md").read_text()
    assert "--format folder" in card and "```python" not in card
    assert "the scores of science/technology, " in card.replace("\n", " ")
    assert "held as nf4" in card and str(tmp_path) not in card
    assert load_file(out / "head.safetensors").keys() == {"head.weight"}
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
