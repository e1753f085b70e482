"""Our training beside the padded loop, at tiny sizes: the same curve, and what is said of it."""

import json
from pathlib import Path

import pytest

from benchmarks import convergence
from mtllm_engine.config import dumps
from tests.support.encoders import build_padded_encoder
from tests.support.tiny import build_config, build_decoder, build_encoder, pack_lines, texts

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ["lora.dropout=0.0", "model.projection_init=least_squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convergence")
    build_encoder(folder / "encoder")
    build_padded_encoder(folder / "e5", "e5-small", max_position_embeddings=64)
    build_decoder(folder / "decoder")
    no_pad = [line for line in texts(120) if "<" not in line]
    pack_lines(folder / "train", no_pad, num_shards=2)
    data = {"lanes": 8, "pack_documents": 5}  # 40: a batch of 32 and one of 8
    optim = {"steps": 6, "lr": 1e-2, "weight_decay": 0.1, "clip": 0.5, "warmup_ratio": 0.3}
    config = build_config(folder, data=data, optim=optim, memory={"max_tokens": 320})
    (folder / "config.toml").write_text(dumps(config))
    return folder


def run(folder: Path, *arguments: str) -> tuple[int, list[dict]]:
    """Exit status and rows, what was said of the machine first."""
    out = folder / "out" / "rows.jsonl"
    out.unlink(missing_ok=True)
    words = [str(folder / "config.toml"), "--out", str(out), *arguments]
    status = convergence.main(words)
    lines = out.read_text().splitlines() if out.exists() else []
    return status, [json.loads(line) for line in lines]


@pytest.mark.parametrize(("encoder", "causal"), [("encoder", "true"), ("e5", "false")])
def test_in_fp32_both_learn_the_same(folder: Path, encoder: str, causal: str):
    models = [f"model.encoder={folder / encoder}", f"model.causal={causal}"]
    status, (about, *rows) = run(folder, *PLAIN, *models)
    assert status == 0 and about["dtype"] == "float32" and about["commit"]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["fvu"]["padded"] < 0.8 * rows[0]["fvu"]["padded"]
    for row in rows:
        for kind in ("fvu", "loss"):
            for value in row[kind].values():
                assert value == pytest.approx(row[kind]["padded"], rel=1e-5)
        assert row["padding"]["ours"] == 0 < row["padding"]["padded sorted"]
        assert min(row["seconds"].values()) > 0
    report = (folder / "out" / "rows.md").read_text()
    assert "6 of 6 steps, 40 documents each" in report and ": the same to rounding." in report
    assert (folder / "out" / "rows.png").stat().st_size > 10_000
    assert not (folder / "run").exists()


def test_in_bf16_ours_is_about_as_far_from_fp32_as_the_loop(folder: Path):
    models = [f"model.encoder={folder / 'e5'}", "model.dtype=bfloat16"]
    _, (_, *rows) = run(folder, *PLAIN, *models)
    apart = convergence.distances(rows)
    assert apart.pop("padded fp32") == 0 and min(apart.values()) > 1e-4
    assert apart["ours"] < 3 * apart["padded"] < 0.3


def test_another_training_is_not_the_same(folder: Path, capsys, monkeypatch):
    """The loop's learning rate is wrong by a hundredth."""
    right = convergence.learning_rate
    monkeypatch.setattr(convergence, "learning_rate", lambda *args: 1.01 * right(*args))
    status, _ = run(folder, *PLAIN, "--steps", "3")
    assert status == 3 and "ours / padded - 1" in (said := capsys.readouterr().out)
    assert ": not the same to rounding." in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lora.dropout=0.05: masks differ; set lora.dropout=0.0"),
        ([*PLAIN, "data.parts=lines"], 'the loop has no such thing; set data.parts="whole"'),
        ([*PLAIN, "--steps", "7"], "--steps 7: the training has 6"),
        ([*PLAIN, "--steps", "0"], "--steps 0: the training has 6"),
        ([*PLAIN, "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys, arguments: list[str], message: str):
    assert run(folder, *arguments) == (1, [])
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1] and not output.out
