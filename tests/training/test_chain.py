"""Runs on an LLM with adapters merged first are runs on the merged LLM; all that comes out says
which chain it stands on, and meets no other.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from mtllm_engine import files
from mtllm_engine.config import Config
from mtllm_engine.evaluate import evaluate
from mtllm_engine.finetune import finetune
from mtllm_engine.inference import MTLLM
from mtllm_engine.model.peft import read_chain
from mtllm_engine.show import show
from mtllm_engine.targets import write_targets
from mtllm_engine.train import train
from mtllm_engine.training import checkpoint, origins
from mtllm_engine.training.trained import find_trained
from tests.support.adapters import make_adapters
from tests.support.stages import (
    ALONE,
    build_models,
    evaluation_config,
    finetuning_config,
    losses,
    stage1_config,
    stage2_config,
    write_topics,
)
from tests.support.stages import checkpoint as checkpoint_of

pytestmark = pytest.mark.usefixtures("one_thread")
CHAIN = ("mntp", "simcse (unsup)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, two adapters, the LLM that they make, and the stages on the chain."""
    folder = build_models(tmp_path_factory.mktemp("chain"))
    write_topics(folder, "eng_Latn", train=16, dev=7, test=5)
    words = LlamaForCausalLM.from_pretrained(folder / "decoder")
    for name, keys in zip(CHAIN, ({"r": 3}, {"r": 2, "alpha_pattern": {"q_proj": 5}})):
        model = words.model if name == "mntp" else words
        keys |= {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 4}
        make_adapters(model, folder / name, **keys)
        words = LlamaForCausalLM.from_pretrained(folder / "decoder")
    for name in CHAIN:
        model = words.model if name == "mntp" else words
        peft.PeftModel.from_pretrained(model, folder / name).merge_and_unload()
    shutil.copytree(folder / "decoder", folder / "merged")
    words.save_pretrained(folder / "merged")
    (folder / "mntp" / "README.md").write_text("---\nlicense: mit\n---\n")
    train(stage1_config(folder, model=chained(folder)), ALONE)
    finetune(finetuning_config(folder, "sib200", model=chained(folder)), ALONE)
    return folder


def chained(folder: Path) -> dict[str, list[str]]:
    return {"adapters": [str(folder / name) for name in CHAIN]}


def stage2(folder: Path, **model) -> Config:
    run = {"dir": str(folder / "stage2-sib200")}
    return stage2_config(folder, "sib200", model=chained(folder) | model, run=run)


def test_losses_are_those_of_the_merged_llm(folder: Path, tmp_path: Path):
    merged = {"decoder": str(folder / "merged")}
    train(stage1_config(folder, model=merged, run={"dir": str(tmp_path / "stage1")}), ALONE)
    np.testing.assert_allclose(losses(folder / "stage1"), losses(tmp_path / "stage1"), rtol=1e-5)
    bare = stage1_config(folder, run={"dir": str(tmp_path / "bare")})
    train(bare, ALONE)
    assert abs(losses(tmp_path / "bare")[0] / losses(folder / "stage1")[0] - 1) > 1e-3


def test_what_stands_on_a_chain_meets_no_other(folder: Path):
    origins.check_origins(stage2(folder))
    others = ([], chained(folder)["adapters"][:1], chained(folder)["adapters"][::-1])
    for other in others:
        message = "was trained with another model.adapters than .*; set it to that one"
        with pytest.raises(ValueError, match=message) as error:
            origins.check_origins(stage2(folder, adapters=other))
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="cannot continue .*: model.adapters was .* and is "):
            train(stage1_config(folder, model={"adapters": other}, optim={"steps": 9}), ALONE)


def test_a_checkpoint_in_a_chain_meets_what_it_was_trained_with(folder: Path, tmp_path: Path):
    """The LLM, the attention and the adapters before it; of PEFT's folders nothing is known."""
    last = str(checkpoint_of(folder, "stage1", "latest"))
    chain, start = chained(folder)["adapters"], {"init_from": "", "teacher": ""}
    origins.check_origins(stage2(folder, **start, adapters=[*chain, last, chain[0]]))
    for key, change in (
        ("model.decoder", {"decoder": str(folder / "merged")}),
        ("model.causal", {"causal": True}),
        ("model.adapters", {"adapters": [*chain[::-1], last]}),
        ("model.adapters", {"adapters": [chain[0], last, chain[1]]}),
        ("model.adapters", {"adapters": [last, *chain]}),
    ):
        config = stage2(folder, **start, **{"adapters": [*chain, last]} | change)
        message = f"^{last} was trained with another {key} than .*; set it to that one"
        with pytest.raises(ValueError, match=message) as error:
            origins.check_origins(config)
        assert "\n" not in str(error.value)
    damaged = shutil.copytree(last, tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json is damaged; copy it again"):
        origins.check_origins(stage2(folder, **start, adapters=[*chain, str(damaged)]))


def test_checkpoints_from_before_there_were_chains_have_none(folder: Path, tmp_path: Path):
    run = {"dir": str(tmp_path / "run")}
    train(stage1_config(folder, run=run), ALONE)
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    record = json.loads((last / "state.json").read_text())
    assert record["identity"].pop("model.adapters") == ""
    del record["sha256"]
    (last / "state.json").write_bytes(files.sealed(record))
    optim = {"steps": 4, "lr": 0.01, "warmup_ratio": 0.0}
    start = {"init_from": str(last), "teacher": ""}
    with pytest.raises(ValueError, match="another model.adapters"):
        origins.check_origins(stage2(folder, **start))
    origins.check_origins(stage2(folder, **start, adapters=[]))
    train(stage1_config(folder, run=run, optim=optim), ALONE)
    assert len(losses(tmp_path / "run")) == 4


def test_stored_states_are_of_one_chain(folder: Path, capsys):
    def config(chain: list[str]) -> Config:
        data = {"train": [], "teacher_states": "x", "lanes": 4}
        run = {"dir": str(folder / "stored")}
        model = {"adapters": chain, "init_from": "", "teacher": ""}
        return stage2_config(folder, "sib200", model=model, data=data, run=run)

    chain = chained(folder)["adapters"]
    write_targets(config(chain), ALONE)
    assert "teacher's weights: whole on 1 CPU rank (zero.stage=0)\n" in capsys.readouterr().out
    train(config(chain), ALONE)
    shutil.rmtree(folder / "stored" / "checkpoints")
    with pytest.raises(ValueError, match="made with another model.adapters"):
        train(config(chain[:1]), ALONE)


def test_the_header_names_the_chain_and_its_licences(folder: Path, tmp_path: Path, capsys):
    run = {"dir": str(tmp_path / "run")}
    labels = LlamaForSequenceClassification.from_pretrained(folder / "decoder")
    keys = {"r": 2, "target_modules": ["v_proj"], "task_type": "SEQ_CLS"}
    tuned = make_adapters(labels, tmp_path / "tuned", **keys)
    about = json.loads((tuned / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "someone/another-llm"
    (tuned / "adapter_config.json").write_text(json.dumps(about))
    model = {"adapters": [*chained(folder)["adapters"], str(tuned)], "init_from": str(tuned)}
    lora = {"rank": 2, "alpha": 8.0, "target_modules": ["v_proj"]}
    config = stage1_config(folder, model=model, lora=lora, run=run, optim={"steps": 1})
    train(config, ALONE)
    lines = capsys.readouterr().out.splitlines()
    names = ("merged", "licen", "starts from")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines if line.startswith(names))
    note = " (made on someone/another-llm; without the head score, which is no part of the LLM)"
    assert rows["merged"] == " then ".join(model["adapters"]) + note
    assert rows["starts from"] == f"{tuned}{note}, with a new projection"
    assert "mntp: mit" in rows["licences"] and "simcse (unsup): unknown" in rows["licences"]


def test_predictions_know_their_chain(folder: Path):
    train(stage2(folder), ALONE)
    config = evaluation_config(folder, "sib200", f"sib200:{folder}/topics", model=chained(folder))
    evaluate(config, ALONE)
    paths = list((folder / "evaluate-sib200" / "results").rglob("predictions-*.jsonl"))
    chain = checkpoint.chain_of(config.model.adapters)
    assert paths and all(chain in path.read_text() for path in paths)


def test_a_finished_run_is_read_with_its_chain(folder: Path, tmp_path: Path):
    """Where it lay, or, after a move, where it is said to lie."""
    texts, language = ["A text.", "Another one, of more words."], "eng_Latn"
    saved = checkpoint_of(folder, "stage1", "latest")
    assert read_chain(saved) == tuple(chained(folder)["adapters"])
    expected = MTLLM.from_pretrained(folder / "stage1").encode(texts, language, progress=False)
    shown = show(str(folder / "stage1"))
    assert f"{folder}/mntp, licence mit then {folder}/simcse (unsup), licence unknown" in shown
    # The merged LLM in its place, as another decoder, is refused: its checkpoints say so.
    models = {"encoder": str(folder / "encoder"), "decoder": str(folder / "merged")}
    with pytest.raises(ValueError, match="another model.decoder"):
        MTLLM.from_pretrained(folder / "stage1", **models)
    # Adapters that are gone.
    moved = tmp_path / "moved"
    shutil.copytree(folder / "stage1", moved / "stage1")
    config = moved / "stage1" / "config.toml"
    config.write_text(config.read_text().replace(f"{folder}/mntp", f"{folder}/gone"))
    with pytest.raises(ValueError, match="model.adapters: .*/gone is neither a folder nor"):
        MTLLM.from_pretrained(moved / "stage1")
    merged = chained(folder)["adapters"]
    again = MTLLM.from_pretrained(moved / "stage1", merged=merged)
    assert np.array_equal(again.encode(texts, language, progress=False), expected)
    with pytest.raises(ValueError, match="another model.adapters"):
        MTLLM.from_pretrained(moved / "stage1", merged=merged[::-1])
    # One alone is no list of letters.
    with pytest.raises(ValueError, match="another model.adapters than .*/mntp'"):
        MTLLM.from_pretrained(moved / "stage1", merged=merged[0])
    # A checkpoint alone says its chain itself.
    alone = shutil.copytree(saved, tmp_path / "alone")
    models["decoder"] = str(folder / "decoder")
    assert list(find_trained(alone, **models).config.model.adapters) == merged


def test_hub_ids_of_a_chain_stay(tmp_path: Path):
    """Others find them by these, and in no machine's cache; of a run's `latest` it is what lies
    there."""
    step = tmp_path / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "state.json").write_bytes(files.sealed({"step": 2}))
    chain = ["someone/mntp", str(tmp_path / "checkpoints" / "latest")]
    config = stage1_config(tmp_path, model={"adapters": chain, "init_from": "someone/stage1"})
    found = checkpoint.follow(config, find=lambda name: f"/cache/{name}").model
    assert found.adapters == ("someone/mntp", str(step))
    assert found.init_from == ("/cache/someone/stage1",)


def test_a_sum_stands_on_its_parts_chain(folder: Path, tmp_path: Path):
    parts = [
        str(checkpoint_of(folder, *each)) for each in (("stage1", "latest"), ("finetune-sib200",))
    ]
    origins.add_up(parts, tmp_path / "sum")
    assert read_chain(tmp_path / "sum") == tuple(chained(folder)["adapters"])
    found = find_trained(tmp_path / "sum").config.model.adapters
    assert list(found) == chained(folder)["adapters"]
    with pytest.raises(ValueError, match="another model.adapters"):
        origins.check_origins(stage2(folder, init_from=str(tmp_path / "sum"), adapters=[]))
    bare = {"dir": str(tmp_path / "bare")}
    train(stage1_config(folder, run=bare, optim={"steps": 1}), ALONE)
    parts[0] = str(checkpoint.latest(tmp_path / "bare" / "checkpoints"))
    with pytest.raises(ValueError, match="were trained with another model.adapters each"):
        origins.add_up(parts, tmp_path / "other")
