"""The suite for a borrowed GPU, dry: all its stages in small, and what is kept when time runs out."""

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


def test_what_was_done_is_kept_when_time_runs_out(tmp_path: Path):
    assert gpu_suite.main(["--out", str(tmp_path), "--tiny", "--limit", "1"]) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert len(rows) == 3 and all(row["ended"].startswith("cut off after 1 s") for row in rows)


def test_the_fp8_step_is_a_command_that_the_step_benchmark_takes(tmp_path: Path):
    (stage,) = (stage for stage in gpu_suite.stages(tmp_path, tiny=False, fp8=True) if stage.name == "step-fp8")
    arguments = step._build_parser().parse_intermixed_args(stage.command[2:])
    config = step._configure(arguments)
    assert (config.model.base, config.model.dtype, config.zero.stage) == ("fp8", "bfloat16", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
