"""The suite for a borrowed GPU, dry: a slice in small, and what is kept when time runs out."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, encode, evaluation, gpu_suite, kernels, step
from mtllm_engine.kernels import discover
from mtllm_engine.recipe import load as load_recipe
from tests.support.machine import ROOT


def test_a_slice_runs_in_small_and_leaves_its_results(tmp_path: Path, capsys):
    arguments = ["--out", str(tmp_path), "--slice", "attention", "--tiny"]
    assert gpu_suite.main(arguments) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    stages = [("attention", "attention-tests"), ("attention", "attention")]
    assert [(row["slice"], row["stage"]) for row in rows] == stages
    lines = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert lines and all(line["commit"] for line in lines)
    assert "device" in capsys.readouterr().out
    # Of a CPU nobody asks which attention is the fastest.
    assert attention.main([str(tmp_path / "attention.jsonl")]) == 1


def is_fit(stage: gpu_suite.Stage, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what it starts takes these words."""
    _, module, *words = stage.command
    monkeypatch.setattr(sys, "argv", [module, *words])
    if module == "benchmarks.step":
        step._configure(step._build_parser().parse_intermixed_args(words))
    elif module == "benchmarks.kernels":
        return bool(kernels.parse().op)
    elif module == "benchmarks.encode":
        encode._build_parser().parse_args(words)
    elif module == "benchmarks.evaluation":
        evaluation.build_parser().parse_intermixed_args(words)
    elif module == "pytest":
        return all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    elif "run" in words:
        return len(load_recipe(words[1], words[2:]).jobs) > 3
    return True


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", gpu_suite.SLICES)
def test_all_that_a_slice_starts_takes_its_words(tmp_path: Path, monkeypatch, name, tiny):
    suite = gpu_suite.Suite(out=tmp_path, tiny=tiny, fp8=True, flash4=True)
    stages = list(gpu_suite.SLICES[name](suite))
    assert all(is_fit(stage, monkeypatch) for stage in stages)
    assert sum(stage.limit_s for stage in stages) <= gpu_suite.LIMIT_S
    assert len({stage.name for stage in stages}) == len(stages)


@pytest.mark.parametrize("name", ["step", "short"])
def test_a_search_comes_after_the_rows_that_it_might_cost(tmp_path: Path, name):
    stages = gpu_suite.SLICES[name](
        gpu_suite.Suite(out=tmp_path, tiny=False, fp8=True, flash4=True)
    )
    searches = ["--sweep" in stage.command for stage in stages]
    assert any(searches) and not searches[0]


def test_ops_are_measured_in_the_order_in_which_they_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--op", "swiglu", "rope"])
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(kernels, "environment", lambda machine: {})
    measured: list[str] = []
    monkeypatch.setattr(kernels, "measure", lambda op, *_: measured.append(op.name) or [])
    kernels.main()
    assert list(dict.fromkeys(measured)) == ["swiglu", "rope"]


def test_where_the_time_of_an_op_goes_is_told(monkeypatch):
    """Of ours, by operators on a CPU; of others not."""
    monkeypatch.setattr(kernels, "ENOUGH_S", 0.0)
    offered = kernels.providers
    quick = lambda *args: (each for each in offered(*args) if each.name != "torch.compile")  # noqa: E731
    monkeypatch.setattr(kernels, "providers", quick)
    machine = SimpleNamespace(
        device="cpu",
        dtype=torch.float32,
        clock=kernels.Clock("cpu"),
        is_memory_bound=lambda cost: True,
        least_ms=lambda cost: 1.0,
    )
    op = discover()["swiglu"]
    found = [each for each in op.implementations if op.label("cpu") == each]
    rows = list(kernels.measure(op, {"tokens": 8, "width": 64}, machine))
    told = {row["provider"]: row["kernels_ms"] for row in rows if row["status"] == "ok"}
    assert found and {name for name, times in told.items() if times} == set(found)
    times = list(told[found[0]].values())
    assert "mtllm::swiglu_backward" in told[found[0]] and times == sorted(times, reverse=True)


def test_vectors_are_kept_with_each_distribution_of_lengths(tmp_path: Path, monkeypatch, capsys):
    def run(arguments, command: str) -> Iterator[list[dict]]:
        yield [{"lengths": "40"}]
        raise ValueError("5.0e+00 apart")

    monkeypatch.setattr(encode, "_run", run)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    out = tmp_path / "encode.jsonl"
    assert encode.main(["exported", "--out", str(out)]) == 1
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"lengths": "40"}]
    assert capsys.readouterr().err == "benchmarks.encode: error: 5.0e+00 apart\n"


def slice_of(monkeypatch: pytest.MonkeyPatch, *stages: gpu_suite.Stage) -> list[str]:
    """What starts a slice of these."""
    monkeypatch.setattr(gpu_suite, "SLICES", {"attention": lambda suite: iter(stages)})
    return ["--slice", "attention", "--tiny"]


def test_what_was_done_is_kept_when_time_runs_out(tmp_path: Path, monkeypatch):
    """The second stage never ends, on whatever machine: it is cut off, and the third still runs."""
    commands = {"quick": "print('done')", "hangs": "import time; time.sleep(1e6)", "last": "1 / 0"}
    stages = [
        gpu_suite.Stage(name=name, command=("-c", text), limit_s=1.0 if name == "hangs" else 1e6)
        for name, text in commands.items()
    ]
    words = slice_of(monkeypatch, *stages)
    assert gpu_suite.main(["--out", str(tmp_path), *words, "--limit", "1e6"]) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    ends = [("quick", "done"), ("hangs", "cut off after 1 s"), ("last", "failed, status 1")]
    assert [(row["stage"], row["ended"]) for row in rows] == ends
    assert (rows[0]["last_line"], rows[1]["last_line"]) == ("done", "")


def test_what_is_left_of_the_time_limits_a_stage(tmp_path: Path, monkeypatch):
    hangs = gpu_suite.Stage(name="hangs", command=("-c", "while True: pass"), limit_s=1e6)
    words = slice_of(monkeypatch, hangs, hangs)
    assert gpu_suite.main(["--out", str(tmp_path), *words, "--limit", "1"]) == 1
    rows = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [row["ended"] for row in rows] == ["cut off after 1 s"] * 2


def test_a_dry_run_has_no_limit(tmp_path: Path, monkeypatch):
    """A loaded machine may take as long as it likes."""
    limits = []
    row = {"stage": "tests", "ended": "done", "took_s": 1, "last_line": ""}
    words = slice_of(monkeypatch, gpu_suite.Stage(name="tests", command=(), limit_s=180))
    monkeypatch.setattr(gpu_suite, "run", lambda stage, out, limit_s: limits.append(limit_s) or row)
    assert gpu_suite.main(["--out", str(tmp_path), *words]) == 0 and limits == [None]
    assert gpu_suite.main(["--out", str(tmp_path), *words, "--limit", "500"]) == 0
    assert limits[1:] == [180]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
