"""What another run stands on is checked before it is read: that it is whole, and that it meets the
models and the attention that it was trained with.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtllm_engine import files
from mtllm_engine.config import Config
from mtllm_engine.evaluate import evaluate
from mtllm_engine.finetune import finetune
from mtllm_engine.targets import write_targets
from mtllm_engine.train import train
from mtllm_engine.training import checkpoint, origins
from tests.support.stages import (
    ALONE,
    build_models,
    evaluation_config,
    finetuning_config,
    rows,
    stage1_config,
    stage2_config,
    write_topics,
)
from tests.support.stages import checkpoint as checkpoint_of

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINS = {"init_from": ("stage1", "latest"), "teacher": ("finetune-sib200", "best")}
READ = ("adapter_model.safetensors", "projection.safetensors", "head.safetensors")
READ += ("adapter_config.json", "state.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, others of the same shape, and the runs that stage 2 stands on."""
    folder = build_models(tmp_path_factory.mktemp("origins"))
    for side in ("encoder", "decoder"):
        other = shutil.copytree(folder / side, folder / f"other_{side}") / "model.safetensors"
        tensors = load_file(other)
        name = next(name for name in tensors if name.endswith("self_attn.q_proj.weight"))
        tensors[name][0, 0] += 1e-3
        save_file(tensors, other, {"format": "pt"})
    write_topics(folder, "eng_Latn", train=16, dev=7, test=5)
    train(stage1_config(folder), ALONE)
    finetune(finetuning_config(folder, "sib200"), ALONE)
    return folder


def copied(folder: Path, role: str, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(checkpoint_of(folder, *ORIGINS[role]), to)


def standing_on(folder: Path, role: str, origin: Path, **model) -> Config:
    return stage2_config(folder, "sib200", model={role: str(origin), **model})


def flip(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)


def test_what_is_whole_is_taken(folder: Path):
    origins.check_origins(stage2_config(folder, "sib200"))


@settings(max_examples=60)
@given(role=st.sampled_from(sorted(ORIGINS)), data=st.data())
def test_a_flipped_bit_is_noticed(folder: Path, role: str, data: st.DataObject):
    origin = copied(folder, role, folder / "flipped")
    names = [name for name in READ if (origin / name).exists()]
    path = origin / data.draw(st.sampled_from(names))
    flip(path, data)
    with pytest.raises(ValueError, match=f"^{path} is damaged; copy it again") as error:
        origins.check_origins(standing_on(folder, role, origin))
    assert "\n" not in str(error.value)


@settings(max_examples=20)
@given(side=st.sampled_from(["encoder", "decoder"]), data=st.data())
def test_a_flipped_bit_of_a_tokenizer_is_noticed(tmp_path_factory, folder, side, data):
    model = shutil.copytree(folder / side, tmp_path_factory.mktemp("flipped") / side)
    flip(model / "tokenizer.json", data)
    with pytest.raises(ValueError, match=f"was trained with another model.{side} than {model};"):
        origins.check_origins(stage2_config(folder, "sib200", model={side: str(model)}))


@pytest.mark.parametrize("role", ORIGINS)
def test_a_lost_or_an_added_file_is_noticed(folder: Path, tmp_path: Path, role: str):
    origin = copied(folder, role, tmp_path / "origin")
    (origin / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{origin} is not a complete checkpoint"):
        origins.check_origins(standing_on(folder, role, origin))
    origin = copied(folder, role, tmp_path / "origin")
    added = next(name for name in READ if not (origin / name).exists())
    shutil.copy(origin / "adapter_model.safetensors", origin / added)
    with pytest.raises(ValueError, match=f"{added} is damaged"):
        origins.check_origins(standing_on(folder, role, origin))


@pytest.mark.parametrize("role", ORIGINS)
def test_what_is_not_read_may_be_lost(folder: Path, tmp_path: Path, role: str):
    """The optimizer's moments; and a folder that is no run's says nothing of itself."""
    origin = copied(folder, role, tmp_path / "origin")
    (origin / "optimizer.safetensors").unlink()
    origins.check_origins(standing_on(folder, role, origin))
    (origin / "state.json").unlink()
    other = "teacher" if role == "init_from" else "init_from"
    alone = standing_on(folder, role, origin, causal=True, **{other: ""})
    origins.check_origins(alone)


CHANGES = {
    "causal": {"causal": True},
    "decoder": {"decoder": "other_decoder"},
    "encoder": {"encoder": "other_encoder"},
    "encoder_prefix": {"encoder_prefix": "query: "},
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("role", ORIGINS)
def test_another_model_than_it_was_trained_with_is_refused(folder: Path, role: str, changed: str):
    """The LLM's own adapters know no encoder."""
    values = {
        key: str(folder / value) if value in ("other_encoder", "other_decoder") else value
        for key, value in CHANGES[changed].items()
    }
    other = "teacher" if role == "init_from" else "init_from"
    config = stage2_config(folder, "sib200", model={other: "", **values})
    if (role, changed) in (("teacher", "encoder"), ("teacher", "encoder_prefix")):
        origins.check_origins(config)
        return
    origin = checkpoint_of(folder, *ORIGINS[role])
    message = f"^{origin} was trained with another model.{changed} than .*; set it to that one"
    with pytest.raises(ValueError, match=message) as error:
        origins.check_origins(config)
    assert "\n" not in str(error.value)


def evaluation(folder: Path, system: str, **model) -> Config:
    keys = {
        "init_from": str(checkpoint_of(folder, "finetune-sib200")),
        "teacher": str(checkpoint_of(folder, "finetune-sib200")),
    }
    evaluated = {"systems": [system]}
    test = f"sib200:{folder}/topics"
    return evaluation_config(folder, "sib200", test, model=keys | model, evaluate=evaluated)


COMMANDS: dict[str, tuple[Callable, Callable[..., Config]]] = {
    "train": (train, lambda folder, **model: stage2_config(folder, "sib200", model=model)),
    "finetune": (
        finetune,
        lambda folder, **model: finetuning_config(
            folder,
            "sib200",
            "stack",
            model={"init_from": str(checkpoint_of(folder, "stage1", "latest"))} | model,
            run={"dir": str(folder / "finetune-stack")},
        ),
    ),
    "targets": (
        write_targets,
        lambda folder, **model: stage2_config(
            folder, "sib200", model=model, data={"train": [], "teacher_states": "x", "lanes": 4}
        ),
    ),
    "evaluate": (evaluate, lambda folder, **model: evaluation(folder, "llm", **model)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_before_it_builds(folder: Path, tmp_path: Path, command: str):
    run, configure = COMMANDS[command]
    with pytest.raises(ValueError, match="was trained with another model.causal"):
        run(configure(folder, causal=True), ALONE)
    role = "init_from" if command == "finetune" else "teacher"
    origin = copied(folder, role, tmp_path / "origin")
    path = origin / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        run(configure(folder, **{role: str(origin)}), ALONE)


def test_a_checkpoint_from_before_rslora_is_continued(folder: Path, tmp_path: Path):
    config = stage1_config(folder, run={"dir": str(tmp_path / "run")})
    train(config, ALONE)
    path = checkpoint.latest(tmp_path / "run" / "checkpoints") / "state.json"
    record = json.loads(path.read_text())
    del record["sha256"], record["identity"]["lora.rslora"], record["identity"]["data.parts"]
    path.write_bytes(files.sealed(record))
    longer = {"lanes": 4}, {"steps": 4, "lr": 0.01, "warmup_ratio": 0.0}
    config = stage1_config(
        folder, run={"dir": str(tmp_path / "run")}, data=longer[0], optim=longer[1]
    )
    train(config, ALONE)
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    other = stage1_config(folder, run={"dir": str(tmp_path / "run")}, lora={"rslora": True})
    with pytest.raises(ValueError, match="lora.rslora was false and is true"):
        train(other, ALONE)
