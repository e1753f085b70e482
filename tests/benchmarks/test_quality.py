"""The quality benchmark on tiny models: what quantisation costs, and mistakes told in one line."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from mtllm_engine.config import dumps
from tests.support.machine import need_fp8
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder", width=64, layers=2)
    build_corpus(folder / "train", 60)
    build_corpus(folder / "validation", 20, seed=1)
    held_out = {"corpus": str(folder / "validation")}
    config = build_config(folder, validation=held_out, optim={"steps": 1})
    (folder / "config.toml").write_text(dumps(config))
    return folder


def test_a_row_for_each_quantisation(folder: Path, capsys):
    pytest.importorskip("bitsandbytes")
    need_fp8()
    out = folder / "out" / "rows.jsonl"
    assert quality.main([str(folder / "config.toml"), "--out", str(out)]) == 0
    full, fp8, nf4 = (json.loads(line) for line in out.read_text().splitlines())
    assert [row["quantization"] for row in (full, fp8, nf4)] == ["none", "fp8", "nf4"]
    assert full["teacher_error"] == 0 and full["fvu"] == pytest.approx(full["fvu_full"], rel=1e-12)
    assert 1e-3 < fp8["teacher_error"] < 0.1 and fp8["teacher_error"] < nf4["teacher_error"] < 0.5
    assert 0.99 < fp8["teacher_cosine"] < 1 and 0.9 < nf4["teacher_cosine"] < fp8["teacher_cosine"]
    assert (full["bytes_per_weight"], full["documents"], full["steps"]) == (4, 20, 1)
    # With tables of tiny weights.
    assert 2 < fp8["bytes_per_weight"] < 2.2 and 0.5 < nf4["bytes_per_weight"] < 0.8
    for row in (full, fp8, nf4):
        assert row["commit"] and row["device"] and row["command"].endswith(str(out))
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in table] == ["none", "fp8", "nf4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--quantization", "int8"],
            "model.quantization must be one of 'none', 'fp8', 'nf4', not 'int8'",
        ),
        (["validation.corpus=''"], "validation.corpus is empty"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys, arguments: list[str], message: str):
    assert quality.main([str(folder / "config.toml"), *arguments]) == 1
    output = capsys.readouterr()
    assert message in output.err and len(output.err.splitlines()) == 1 and not output.out
