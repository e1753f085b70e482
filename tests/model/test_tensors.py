"""A model's files as others wrote them, and what is none of them."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtllm_engine.data.tokenizers import load_tokenizer
from mtllm_engine.model.tensors import TensorFiles, check_model
from tests.support.tiny import build_decoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2621440\n"
TENSORS = {"a.weight": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}


class Mark:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return build_decoder(tmp_path_factory.mktemp("tensors") / "decoder")


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "torch before 1.6"])
def test_files_of_every_torch_are_read_by_slices(tmp_path: Path, zipped: bool):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    files = TensorFiles(tmp_path)
    assert files.names == [*TENSORS]
    for name, tensor in TENSORS.items():
        assert files.shape(name) == tensor.shape
        assert torch.equal(files.read(name, 1, 5), tensor.reshape(-1)[1:5])
        assert files.read(name, 0, 1).dtype == tensor.dtype


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "torch before 1.6"])
def test_a_pickle_that_asks_for_code_is_refused_by_its_name(tmp_path: Path, zipped: bool):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    content = {**TENSORS, "c": Mark(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"{path} asks for \w+\.system, and code is") as caught:
        TensorFiles(tmp_path)
    assert "\n" not in str(caught.value) and not mark.exists()


NO_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(TENSORS)),
        "is no file of weights; take safetensors",
    ),
    "more than tensors": (
        lambda path: torch.save({"state_dict": TENSORS}, path),
        "holds something else than tensors by their names",
    ),
    "a whole module": (
        lambda path: torch.save(torch.nn.Linear(2, 3), path),
        "asks for torch.nn.modules.linear.Linear, and code is never run",
    ),
    "text": (lambda path: path.write_text("<html>"), "is no file of weights"),
}


@pytest.mark.parametrize("write, message", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_holds_no_weights_is_told(tmp_path: Path, write: Callable, message: str):
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{tmp_path}/pytorch_model.bin {message}") as caught:
        TensorFiles(tmp_path)
    assert "\n" not in str(caught.value)


READERS = {
    "config.json": lambda folder: check_model(folder, "model.decoder"),
    "model.safetensors": TensorFiles,
    "pytorch_model.bin": TensorFiles,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "tokenizer.model": load_tokenizer,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_told(decoder: Path, tmp_path: Path, name: str):
    folder = tmp_path / "clone"
    shutil.copytree(decoder, folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{folder / name} is a git-lfs pointer.*`git lfs pull`"):
        READERS[name](folder)


def test_pointers_that_nothing_reads_are_none_of_our_business(decoder: Path, tmp_path: Path):
    """A clone of which only what is needed was pulled."""
    folder = tmp_path / "clone"
    shutil.copytree(decoder, folder)
    for name in ("pytorch_model.bin", "tokenizer.model", "picture.png"):
        (folder / name).write_text(POINTER)
    check_model(folder, "model.decoder")
    load_tokenizer(folder)
    assert TensorFiles(folder).names == [*load_file(decoder / "model.safetensors")]


@pytest.mark.parametrize("has_config", [True, False], ids=["LLM2Vec's", "PEFT's"])
def test_adapters_in_the_place_of_a_model_are_told(decoder: Path, tmp_path: Path, has_config):
    about = {"base_model_name_or_path": "own/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "adapter_model.safetensors").touch()
    if has_config:
        shutil.copy(decoder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="into model.adapters, and the model .*own/base, as model"):
        check_model(tmp_path, "model.decoder")
    shutil.copy(decoder / "model.safetensors", tmp_path)  # then it is one, whatever lies beside it
    check_model(tmp_path, "model.decoder")


@pytest.mark.parametrize(
    ("family", "layer", "kept", "name"),
    [
        ("llama", "model.layers.0.w", "lm_head.weight", "model.embed_tokens.weight"),
        ("m2m_100", "model.encoder.layers.0.w", "lm_head.weight", "model.shared.weight"),
        (
            "m2m_100",
            "model.encoder.layers.0.w",
            "model.decoder.embed_tokens.weight",
            "model.shared.weight",
        ),
    ],
)
def test_an_embedding_stands_under_any_of_the_names_that_share_it(
    tmp_path: Path, family: str, layer: str, kept: str, name: str
):
    save_file({kept: torch.ones(4, 2), layer: torch.zeros(1)}, tmp_path / "model.safetensors")
    about = {"model_type": family, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(about))
    files = TensorFiles(tmp_path)
    assert set(files.names) == {layer, name} and files.read(name, 0, 8).tolist() == 8 * [1.0]
    (tmp_path / "config.json").write_text(json.dumps(about | {"tie_word_embeddings": False}))
    assert set(TensorFiles(tmp_path).names) == {layer, kept}
    both = {kept: torch.ones(4, 2), layer: torch.zeros(1), name: torch.zeros(4, 2)}
    save_file(both, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert TensorFiles(tmp_path).read(name, 0, 8).tolist() == 8 * [0.0]
