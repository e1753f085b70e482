"""The suite for a borrowed GPU, dry: its stages in small, and what is kept when time runs out."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, step


def test_stages_run_in_small_and_leave_their_results(tmp_path: Path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny"]) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [row["stage"] for row in rows] == ["tests", "step", "kernels"]
    for name in ("step", "kernels"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert lines and all(line["commit"] for line in lines)
    assert "device" in capsys.readouterr().out


def test_what_was_done_is_kept_when_time_runs_out(tmp_path: Path, monkeypatch):
    """The second stage never ends, on whatever machine: it is cut off, and the third still runs."""
    commands = {"quick": "print('done')", "hangs": "import time; time.sleep(1e6)", "last": "1 / 0"}
    stages = [
        gpu_suite.Stage(name=name, command=("-c", text), limit_s=1.0 if name == "hangs" else 1e6)
        for name, text in commands.items()
    ]
    monkeypatch.setattr(gpu_suite, "stages", lambda out, *, tiny, fp8: stages)
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny", "--limit", "1e6"]) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    ends = [("quick", "done"), ("hangs", "cut off after 1 s"), ("last", "failed, status 1")]
    assert [(row["stage"], row["ended"]) for row in rows] == ends
    assert (rows[0]["last_line"], rows[1]["last_line"]) == ("done", "")


def test_what_is_left_of_the_time_limits_a_stage(tmp_path: Path, monkeypatch):
    hangs = gpu_suite.Stage(name="hangs", command=("-c", "while True: pass"), limit_s=1e6)
    monkeypatch.setattr(gpu_suite, "stages", lambda out, *, tiny, fp8: [hangs, hangs])
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny", "--limit", "1"]) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [row["ended"] for row in rows] == ["cut off after 1 s"] * 2


def test_a_dry_run_has_no_limit(tmp_path: Path, monkeypatch):
    """A loaded machine may take as long as it likes."""
    limits = []
    stage = gpu_suite.Stage(name="tests", command=(), limit_s=180)
    row = {"stage": "tests", "ended": "done", "took_s": 1, "last_line": ""}
    monkeypatch.setattr(gpu_suite, "stages", lambda out, *, tiny, fp8: [stage])
    monkeypatch.setattr(gpu_suite, "run", lambda stage, out, limit_s: limits.append(limit_s) or row)
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny"]) == 0 and limits == [None]
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny", "--limit", "500"]) == 0
    assert limits[1:] == [180]


def test_the_fp8_step_is_a_command_that_the_step_benchmark_takes(tmp_path: Path):
    stages = gpu_suite.stages(tmp_path, tiny=False, fp8=True)
    (command,) = (stage.command for stage in stages if stage.name == "step-fp8")
    arguments = step._build_parser().parse_intermixed_args(command[2:])
    config = step._configure(arguments)
    assert (config.model.quantization, config.model.dtype) == ("fp8", "bfloat16")
    assert config.zero.stage == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
