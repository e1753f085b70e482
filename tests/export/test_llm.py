"""The merged LLM: what its card's client makes of texts gives our vectors in transformers."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaModel

from mtllm_engine.export import Options, llm, models, streaming
from mtllm_engine.training.trained import Trained
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
ARCHITECTURES = {False: "LlamaBidirectionalModel", True: "LlamaModel"}
READING = """
import numpy
from transformers import AutoModel

llm, about = AutoModel.from_pretrained(".", output_loading_info=True)
assert not any(about.values()), about


def mean(text, language):
    embedded = embed(text, language)
    with torch.no_grad():
        return llm(inputs_embeds=embedded[None]).last_hidden_state[0].mean(0)

"""


@pytest.fixture(scope="module")
def stacks(tmp_path_factory) -> dict[bool, Trained]:
    """By whether attention is causal; that one has adapters of some linears alone."""
    folder = tmp_path_factory.mktemp("models")
    few = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    return {
        causal: build_trained(folder, bias=causal, causal=causal, **(few if causal else {}))
        for causal in (False, True)
    }


def test_the_clients_embeddings_give_our_vectors(stacks: dict[bool, Trained], tmp_path):
    program = "import os\n"
    for causal, trained in stacks.items():
        out = tmp_path / str(causal)
        out.mkdir()
        llm.write(trained, out, AS_STORED)
        asking = f"[[mean(text, each) for text in {TEXTS!r}] for each in {LANGUAGES!r}]"
        saving = f"numpy.save('theirs.npy', {asking})\n"
        program += f"os.chdir({str(out)!r})\n{program_of(out / 'README.md')}{READING}{saving}"
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [ARCHITECTURES[causal]]
        assert config.get("pooling") == (None if causal else "avg")
        assert config.get("is_causal", True) == causal
        for path in out.rglob("*.json"):
            assert str(tmp_path.parent) not in path.read_text()
    run_alone(program, tmp_path)
    for causal, trained in stacks.items():
        for language, theirs_ND in zip(LANGUAGES, np.load(tmp_path / str(causal) / "theirs.npy")):
            assert_same(our_vectors(trained, TEXTS, language), theirs_ND)


def test_weights_are_merged_in_fp32_and_then_cast(stacks: dict[bool, Trained], tmp_path):
    written = {}
    for dtype in ("", "bfloat16"):
        out = tmp_path / (dtype or "stored")
        out.mkdir()
        llm.write(stacks[False], out, Options(dtype=dtype))
        written[dtype] = load_file(out / "model.safetensors")
        assert json.loads((out / "config.json").read_text())["dtype"] == (dtype or "float32")
    assert written[""].keys() == written["bfloat16"].keys()
    for name, tensor in written[""].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(written["bfloat16"][name], tensor.bfloat16())


def test_no_tensor_is_held_whole(stacks: dict[bool, Trained], monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 100)
    tensors = [*models.merged_llm(stacks[False], ""), *models.encoder_tensors(stacks[False], "")]
    assert max(math.prod(tensor.shape) for tensor in tensors) > 10_000
    for tensor in tensors:
        pieces = [piece.numel() for piece in tensor.read()]
        assert sum(pieces) == math.prod(tensor.shape)
        assert max(pieces) <= 100 + tensor.shape[-1]


def test_without_adapters_the_weights_are_the_bases(stacks: dict[bool, Trained], tmp_path):
    trained = stacks[True]
    (trained.student / "adapter_model.safetensors").unlink()
    llm.write(trained, tmp_path, AS_STORED)
    base = LlamaModel.from_pretrained(trained.config.model.decoder).state_dict()
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == base.keys()
    assert all(torch.equal(written[name], base[name]) for name in base)
