"""`mtllm plan`: what it prints is what it reckons with, what it recommends can be pasted and fits,
and what it cannot know it says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mtllm_engine import cli
from mtllm_engine.config import dumps, load
from mtllm_engine.outlook import (
    COPIED,
    SHARDED,
    WHOLE,
    chosen,
    examine,
    fastest,
    layouts_of,
    smallest_change,
)
from mtllm_engine.training.gpus import GPUS, Cluster
from tests.support.machine import ROOT
from tests.support.recipes import TEXT, recipe_of
from tests.support.stages import build_models, write_topics
from tests.support.tiny import build_config, build_corpus

PRESETS = ROOT / "configs" / "presets"
EIGHT, SEVENTY = PRESETS / "llama3_8b_8x80gb.toml", PRESETS / "llama3_70b_16x80gb.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models, a corpus of 64 documents, a task."""
    folder = build_models(tmp_path_factory.mktemp("models"))
    build_corpus(folder / "corpus", 64)
    write_topics(folder, "eng_Latn", train=12, dev=4, test=4)
    write_topics(folder, "swh_Latn", train=12, dev=4, test=6)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No hub, nothing fetched earlier, no GPU."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def printed(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    assert cli.main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    """The columns of a line."""
    (line,) = (each for each in text.splitlines() if re.match(rf" *{name}(?!:)", each))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_a_preset_is_planned_without_its_models(capsys):
    text = printed(capsys, EIGHT, "--gpu", "h100", "--gpus", "8")
    assert "model.decoder is not here: taken to be as large as llama-3-8b, by its name" in text
    assert "texts are taken to be as long as data.max_length, an upper bound" in text
    assert row(text, "memory of a GPU, GB") == ["whole", "sharded"]
    subject, cluster = examine(load(EIGHT), []), Cluster(gpu=GPUS["h100"], gpus=8)
    both = [subject.estimate(cluster, each) for each in (WHOLE, SHARDED)]
    assert row(text, "together") == [f"{each.bytes / 1e9:.2f}" for each in both]
    assert row(text, "of 80") == ["fits", "fits"]
    assert row(text, "seconds") == [f"{each.step.seconds:.3f}" for each in both]
    assert row(text, "weights gathered")[0] == "-"
    hours = [10_000 * each.step.seconds / 3600 for each in both]
    assert row(text, "10,000 steps, hours") == [f"{each:.1f}" for each in hours]
    assert row(text, "GPU-hours") == [f"{8 * each:.1f}" for each in hours]
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) < 120


def test_what_is_recommended_can_be_pasted_and_fits(capsys):
    cluster = Cluster(gpu=GPUS["h100"], gpus=8, nodes=2)
    settings, best = fastest(examine(load(SEVENTY, ["memory.recompute=layer"]), []), cluster)
    words = [f"{key}={value}" for key, value in settings.items()]
    pasted = examine(load(SEVENTY, ["memory.recompute=layer", *words]), [])
    again = pasted.estimate(cluster, best.layout)
    assert best.fits and again.step.seconds == best.step.seconds and again.bytes == best.bytes
    other, _ = fastest(pasted, cluster)
    assert other == {}


@pytest.mark.parametrize(
    ("path", "gpu", "settings", "expected"),
    [
        (EIGHT, "a100-40", ["memory.max_tokens=16384"], {"memory.recompute": "layer"}),
        (SEVENTY, "a100-80", [], {"model.quantization": "nf4"}),
    ],
)
def test_the_smallest_change_makes_it_fit(path: Path, gpu: str, settings: list, expected: dict):
    cluster = Cluster(gpu=GPUS[gpu])
    whole = ["zero.secondary=none", "zero.stage=0"]
    subject = examine(load(path, [*whole, *settings]), [])
    assert not subject.estimate(cluster, WHOLE).fits
    assert smallest_change(subject, cluster, WHOLE) == expected
    words = [f"{key}={value}" for key, value in expected.items()]
    changed = examine(load(path, [*whole, *settings, *words]), [])
    assert changed.estimate(cluster, WHOLE).fits


def test_what_no_setting_makes_fit_needs_more_gpus(capsys):
    words = ["memory.recompute=layer", "memory.max_tokens=2048", "zero.stage=3"]
    text = printed(capsys, SEVENTY, *words, "--gpu", "4090")
    assert re.search(r"^to fit +on \d+ GPUs zero.stage=3$", text, re.MULTILINE)


def test_more_gpus_than_lanes_make_the_batch_larger(capsys):
    text = printed(capsys, EIGHT, "--gpu", "h100", "--gpus", "8", "--nodes", "12")
    assert "reckoned with data.lanes=96, and a step has 1.5 x the documents" in text
    assert "a step  96 packs of 2048 tokens" in text


def test_texts_that_are_here_are_counted(folder: Path, tmp_path: Path, capsys):
    data = {"train": [str(folder / "corpus")], "lanes": 4, "pack_documents": 2}
    path = tmp_path / "config.toml"
    config = build_config(folder, data=data, optim={"epochs": 2.0, "steps": 0})
    path.write_text(dumps(config))
    text = printed(capsys, path, "--gpu", "4090")
    assert re.search(r"note +texts: \d+ and \d+ tokens on average, of 200 documents or fewer", text)
    assert row(text, "16 steps, hours")  # 64 documents twice, 8 in a step
    subject = examine(config, [])
    assert subject.texts.is_known and 0 < subject.texts.longer < 64
    assert replace(subject, num_documents=None).num_steps is None


def test_a_recipe_is_planned_step_by_step(folder: Path, tmp_path: Path, capsys):
    path = recipe_of(folder, tmp_path, "corpus")
    out = printed(capsys, path, "--gpu", "h100")
    assert "2 x H100" in out  # the recipe's own number
    assert row(out, "stage1")[:2] == ["1", "100"]
    assert row(out, "finetune")[:2] == ["2", "5"]  # 12 examples 3 times, 8 in a step, two seeds
    assert row(out, "stage2")[:2] == ["2", "8"]
    assert row(out, "evaluate")[:2] == ["2", "2"]  # 4 and 6 examples
    names = ("stage1", "finetune", "stage2", "evaluate", "together")
    *seconds, total = (float(row(out, name)[-2].removesuffix(" s")) for name in names)
    assert all(seconds) and total == pytest.approx(sum(seconds), abs=3e-3)
    assert not (tmp_path / "out").exists()
    systems = 'evaluate.systems=["llm", "translate_test", "stack"]'
    words = ["stage2.data.teacher_states=states", systems, "--gpus", "1", "--gpu", "h100"]
    more = printed(capsys, path, *words)
    assert "1 x H100" in more and "translation is not counted" in more
    assert row(more, "targets")[:2] == ["2", "2"]  # 12 examples, 8 in a step
    longer, shorter = (float(row(text, "evaluate")[-2].removesuffix(" s")) for text in (more, out))
    assert longer > shorter  # three systems on one GPU, and not one on two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h300"], "--gpu h300: there is no such GPU; choose one of a100-40, a100-80,"),
        ([], "there is no GPU here that PyTorch sees; name one by --gpu a100-40|a100-80|h100|"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["--gpu", "h100", "--nodes", "-1"], "--nodes must be at least 1, not -1"),
        (["model.decoder=x", "--gpu", "h100"], "model.decoder: x is not here, and no model whose"),
        (["optim.lrr=1", "--gpu", "h100"], "unknown key: optim.lrr"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys):
    assert cli.main(["plan", str(EIGHT), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mtllm: error: {message}")


def test_a_recipe_without_its_models_is_one_line(tmp_path: Path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT.format(folder=tmp_path / "out"))
    assert cli.main(["plan", str(path), "--gpu", "h100"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mtllm: error: model.encoder: nllb is not here")


def test_a_slow_network_asks_for_a_copy_on_each_node():
    slow = GPUS["h100"]._replace(network_gbytes_per_s=0.3)
    cluster = Cluster(gpu=slow, gpus=8, nodes=2)
    bare = ["zero.secondary=none"]
    settings, best = fastest(examine(load(SEVENTY, bare), []), cluster)
    assert settings["zero.secondary"] == "node" and best.layout == COPIED
    words = [f"{key}={value}" for key, value in settings.items()]
    pasted = examine(load(SEVENTY, [*bare, *words]), [])
    estimates = [pasted.estimate(cluster, each) for each in layouts_of(pasted.config, cluster)]
    assert chosen(pasted.config, estimates).layout == COPIED
    assert fastest(pasted, cluster)[0] == {}
