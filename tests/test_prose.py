"""Real prose: ordinary checkpoints that learned it, and stage 1 from the corpus to the table."""

import functools
from pathlib import Path

import pytest

from mtllm_engine.babel.models import build_llm
from mtllm_engine.config import load
from mtllm_engine.data.shards import verify
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.training.report import read_metrics
from tests.support.machine import ROOT
from tests.support.prose import build_encoder, collect_prose, main, split_prose, write_prose

PROSE = functools.cache(collect_prose)
CONFIG = ROOT / "tests" / "support" / "prose.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prose and models in small: few steps of training, few words."""
    folder = tmp_path_factory.mktemp("prose")
    write_prose(folder, encoder_steps=12, decoder_steps=12, vocab_size=700)
    return folder


def overrides(folder: Path) -> list[str]:
    paths = {f"model.{side}": side for side in ("encoder", "decoder")} | {"run.dir": "run"}
    paths |= {"data.train": "train", "validation.corpus": "validation"}
    return [f"{key}={folder / name}" for key, name in paths.items()]


def test_prose_is_english_without_duplicates():
    training, validation = split_prose(PROSE())
    assert len(training) > 2000 and 0.05 < len(validation) / len(training) < 0.2
    assert not set(training) & set(validation) and len(set(training)) == len(training)
    words = " ".join(training).lower().split()
    assert 0.03 < words.count("the") / len(words) < 0.1


def test_held_out_documents_stay_held_out_when_others_come_and_go():
    texts = [
        f"{word} is one of the words that this sentence could be about"
        for word in ("Tea", "Sea", "Key", "Bee")
    ]
    _, validation = split_prose(texts, held_out=0.5)
    for gone in texts:
        _, others = split_prose([text for text in texts if text != gone], held_out=0.5)
        assert others == [text for text in validation if text != gone]


def test_models_are_ordinary_checkpoints(folder: Path):
    config = load(CONFIG, overrides(folder))
    stack, _ = build_stack(config)
    tokenizer = build_tokenizer(config, stack)
    assert len(tokenizer.languages.codes) == 202
    student_ids_S, teacher_ids_T = tokenizer("A sentence of words.", "eng_Latn")
    assert (
        tokenizer.encoder.decode(student_ids_S, skip_special_tokens=True) == "A sentence of words."
    )
    assert (
        tokenizer.decoder.decode(teacher_ids_T, skip_special_tokens=True) == "A sentence of words."
    )


def test_models_learn(tmp_path: Path):
    training, _ = split_prose(PROSE()[:300])
    for build in (build_encoder, build_llm):
        losses = build(
            tmp_path / build.__name__, training, steps=60, vocab_size=500, width=64, layers=1
        )
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_command_ends_with_a_table_and_a_picture(folder: Path, capfd):
    arguments = [
        str(CONFIG),
        *overrides(folder),
        "optim.steps=4",
        "run.log_every=1",
        "data.lanes=4",
    ]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    for expected in (
        "held-out FVU before",
        "held-out FVU after",
        "pair tokens/s",
        "checkpoints/latest",
        "curve.png",
    ):
        assert expected in printed
    assert verify(folder / "train", progress=False) == []
    training, validation = read_metrics(folder / "run")
    assert len(training) == 4 and len(validation) == 2
    assert (folder / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "encoder" / "model.safetensors").stat().st_mtime_ns
    assert main([*arguments, "optim.steps=5"]) == 0  # what is there is used, and the run goes on
    assert (folder / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    assert len(read_metrics(folder / "run")[0]) == 5


@pytest.mark.parametrize("mistake", ["optim.lrr=1", "optim.steps=none", "data.lanes=0"])
def test_a_mistake_is_one_line(mistake: str, tmp_path: Path, capfd):
    assert main([str(CONFIG), f"model.encoder={tmp_path / 'encoder'}", mistake]) == 1
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and mistake.partition("=")[0] in errors[0]
