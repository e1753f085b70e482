"""Files written piece by piece: what safetensors and transformers read of them, and what is held
meanwhile.
"""

import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from mtllm_engine.config import LoraConfig
from mtllm_engine.export import streaming
from mtllm_engine.export.streaming import Planned, merged, planned, write_safetensors
from mtllm_engine.model.tensors import TensorFiles

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def planned_of(name: str, tensor: torch.Tensor, size: int) -> Planned:
    pieces = tensor.reshape(-1).split(size) if tensor.numel() else ()
    return Planned(name, tensor.dtype, tuple(tensor.shape), lambda: pieces)


shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3)


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6), st.integers(1, 9))
def test_any_tensors_are_read_as_they_were(tmp_path_factory, about, size):
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        f"tensor.{number}": torch.randn(shape).to(dtype)
        for number, (shape, dtype) in enumerate(about)
    }
    path = folder / "model.safetensors"
    write_safetensors(path, [planned_of(name, each, size) for name, each in tensors.items()])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_large_models_are_shards_that_transformers_opens(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = LlamaModel(config)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(streaming, "SHARD_BYTES", 5000)
    tensors = [planned_of(name, each, 100) for name, each in model.state_dict().items()]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.bytes for each in tensors)
    loaded = LlamaModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_merged_weight_is_the_sum_whatever_the_pieces(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(streaming, "PIECE", 37)  # no multiple of a row
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 10, generator=generator)
    adapters = {
        "x.q_proj.lora_A.weight": torch.randn(4, 10, generator=generator),
        "x.q_proj.lora_B.weight": torch.randn(23, 4, generator=generator),
    }
    save_file({"q.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "student").mkdir()
    save_file(adapters, tmp_path / "student" / "a.safetensors")
    files = TensorFiles(tmp_path / "student", [tmp_path / "student" / "a.safetensors"])
    lora = LoraConfig(rank=4, alpha=12.0)
    own = planned(TensorFiles(tmp_path), "q.weight", dtype=dtype, to="w")
    write_safetensors(tmp_path / "out.safetensors", [merged(own, files, "x.q_proj", lora)])
    got = load_file(tmp_path / "out.safetensors")["w"]
    lora_A_RD, lora_B_FR = adapters.values()
    expected = (weight + 3.0 * lora_B_FR @ lora_A_RD).to(dtype or torch.float32)
    torch.testing.assert_close(got, expected)


def test_no_tensor_is_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 1000)
    save_file({f"w{i}": torch.randn(200, 100) for i in range(3)}, tmp_path / "model.safetensors")
    held, most = 0, 0
    read = TensorFiles.read

    def counting(self, name, start, stop):
        nonlocal held, most
        piece = read(self, name, start, stop).clone()
        held += piece.numel()
        most = max(most, held)
        weakref.finalize(piece, release, piece.numel())
        return piece

    def release(count):
        nonlocal held
        held -= count

    monkeypatch.setattr(TensorFiles, "read", counting)
    tensors = TensorFiles(tmp_path)
    plans = [planned(tensors, name, dtype=None) for name in tensors.names]
    write_safetensors(tmp_path / "out.safetensors", plans)
    assert 1000 <= most <= 2000 and held == 0  # one is made while the last is let go


def test_a_value_that_is_not_finite_is_named(tmp_path):
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    plan = planned(TensorFiles(tmp_path), "w", dtype=None)
    with pytest.raises(ValueError, match="w has values that are NaN"):
        write_safetensors(tmp_path / "out.safetensors", [plan])
