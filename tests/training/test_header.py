"""What a run says of itself before it begins."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors

from mtllm_engine.kernels import discover
from mtllm_engine.train import train
from mtllm_engine.training import log
from tests.support.encoders import build_under_nllb
from tests.support.stages import ALONE, build_models, stage1_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lost", [False, True])
def test_the_header_shows_what_is_put_around_a_text(tmp_path: Path, capsys, lost: bool):
    """And so that a tokenizer has lost its start of text."""
    build_models(tmp_path)
    path = str(tmp_path / "decoder" / "tokenizer.json")
    if lost:
        backend = Tokenizer.from_file(path)
        backend.post_processor = processors.ByteLevel()
        backend.save(path)
    train(stage1_config(tmp_path, optim={"steps": 1}), ALONE)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("texts ")]
    teacher = "nothing put around them" if lost else "<|begin_of_text|> ..."
    assert row.split(maxsplit=1)[1] == f"encoder: LANGUAGE ... </s>; LLM: {teacher}"


def test_the_header_says_what_may_be_done_with_what_comes_out(tmp_path: Path, capsys):
    build_models(tmp_path)
    (tmp_path / "encoder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    train(stage1_config(tmp_path, optim={"steps": 1}), ALONE)
    printed = capsys.readouterr().out.splitlines()
    (row,) = [line for line in printed if line.startswith("licences ")]
    said = "encoder: cc-by-nc-4.0, decoder: unknown, train: unknown"
    assert row.split(maxsplit=1)[1] == said


def test_the_header_says_what_is_added_up(tmp_path: Path, capsys):
    build_models(tmp_path)
    config = stage1_config(tmp_path, optim={"steps": 1})
    train(config, ALONE)
    first = next((tmp_path / "stage1" / "checkpoints").glob("step-*"))
    second = tmp_path / "second"
    shutil.copytree(first, second)
    (second / "projection.safetensors").unlink()
    (second / "state.json").unlink()
    capsys.readouterr()
    model = {"init_from": [str(first), str(second)]}
    lora = {"rank": 0, "alpha": 0, "train": "first"}
    added = stage1_config(tmp_path, model=model, lora=lora, run={"dir": str(tmp_path / "sum")})
    train(replace(added, optim=config.optim), ALONE)
    printed = capsys.readouterr().out.splitlines()
    (row,) = [line for line in printed if line.startswith("starts from ")]
    said = f"{first} + {second}: adapters of rank 8, of which {first} learns"
    assert row.split(maxsplit=2)[2] == said
    # Without a projection, as LLM2Vec's.
    alone = stage1_config(
        tmp_path,
        model={"init_from": str(second)},
        run={"dir": str(tmp_path / "alone")},
        optim={"steps": 1},
    )
    train(alone, ALONE)
    printed = capsys.readouterr().out.splitlines()
    (row,) = [line for line in printed if line.startswith("starts from ")]
    assert row.split(maxsplit=2)[2] == f"{second}, with a new projection"


def test_the_header_says_how_an_encoder_of_transformers_runs(tmp_path: Path, capsys):
    """And counts it, and no kernel of ours that it does not need."""
    build_models(tmp_path)
    build_under_nllb(tmp_path / "encoder")
    train(stage1_config(tmp_path, optim={"steps": 1}), ALONE)
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "(frozen, whole on each rank; transformers' XLMRobertaModel, sdpa" in printed["encoder"]
    files = (tmp_path / side / "model.safetensors" for side in ("encoder", "decoder"))
    tensors = [item for path in files for item in load_file(path).items()]
    unread = ("pooler", "lm_head")
    frozen = sum(each.numel() for name, each in tensors if not name.startswith(unread))
    assert f"{frozen:,} frozen in float32" in printed["parameters"]
    assert "projection" not in printed["kernels"] and "attention" in printed["kernels"]


@pytest.mark.parametrize("place", ["linear", "swiglu"])
def test_the_header_says_where_adapters_are_added(tmp_path: Path, capsys, place: str):
    build_models(tmp_path)
    model = {"lora_update": place}
    train(stage1_config(tmp_path, model=model, optim={"steps": 1}), ALONE)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels ")]
    has_no_effect = row.endswith("; model.lora_update has no effect")
    assert has_no_effect == (place == "swiglu") and "swiglu" in row


def test_a_gpu_adds_them_in_swiglu():
    pytest.importorskip("triton")
    stack = SimpleNamespace(
        attention=discover()["attention"], encoder=None, decoder=SimpleNamespace(defers=True)
    )
    assert log._kernels(stack, "cuda").endswith("; gate's and up's adapters are added in swiglu")
