"""What ranks do when their launcher is gone, and what they do not outlive."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtllm_engine.config import dumps
from mtllm_engine.train import train
from mtllm_engine.training.launch import launchers
from mtllm_engine.training.lock import NAME, started
from tests.support.machine import HANG_S, ROOT
from tests.support.stages import losses, rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

STEPS = 400  # far more than are done by the time that the launcher is killed
LEAVES_S = 10.0
TREE = """
import os, subprocess, sys
if sys.argv[1:]:
    subprocess.run([sys.executable, *sys.argv[1:]])
else:
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 60)
    return folder


def ranks_of(launcher: int) -> list[int]:
    """The processes of a launcher's tree that train."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    tree = {launcher}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sorted(tree & set(parents) - set(parents.values()))


def test_ranks_leave_with_a_killed_launcher_and_the_same_command_goes_on(models: Path):
    """The launcher alone is killed, as by the kernel or by hand; two ranks save nothing more."""
    run = models / "killed"
    sections = {"optim": {"steps": STEPS, "lr": 1e-3}, "checkpoint": {"every": 3, "keep": STEPS}}
    config = build_config(models, run={"dir": str(run)}, **sections)
    (models / "killed.toml").write_text(dumps(config))
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", str(models / "killed.toml")]
    with (models / "said").open("w") as said:
        launcher = subprocess.Popen(
            [*command, "--gpus", "2"],
            stdout=said,
            stderr=said,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    ranks: dict[int, str] = {}
    try:
        while launcher.poll() is None and not list(run.glob("checkpoints/step-*6")):
            time.sleep(0.05)
        ranks = {rank: started(rank) for rank in ranks_of(launcher.pid)}
        assert len(ranks) == 2
        # Neither the launcher nor a library said a word of its own until now.
        output = (models / "said").read_text()
        assert not re.search("warning|site-packages|\\[deepspeed|\r", output, re.I), output
        launcher.kill()
        launcher.wait()
        killed_s = time.monotonic()
        before = sorted(run.glob("checkpoints/step-*"))
        while any(started(rank) == start for rank, start in ranks.items()):
            assert time.monotonic() < killed_s + LEAVES_S
            time.sleep(0.05)
    finally:
        launcher.kill()
        for rank, start in ranks.items():
            if started(rank) == start:
                os.kill(rank, signal.SIGKILL)
    saved = sorted(run.glob("checkpoints/step-*"))
    assert saved[: len(before)] == before and len(saved) <= len(before) + 1  # one was under way
    last = int(saved[-1].name[5:])
    assert last < STEPS  # LOCK may be there still, or gone with a rank that missed the other first
    sections["optim"] |= {"steps": last + 2, "warmup_ratio": 0.0}
    plain = build_config(models, run={"dir": str(run)}, zero={"stage": 0}, **sections)
    train(plain, build_world())
    assert [row["step"] for row in rows(run)] == list(range(1, last + 3))
    assert not (run / NAME).exists() and len(losses(run)) == last + 2


def test_a_dead_rank_takes_the_others_along_where_weights_are_whole(models: Path):
    """As where they are sharded; what was saved stays, and the same command goes on."""
    run = models / "lost"
    sections = {"optim": {"steps": STEPS, "lr": 1e-3}, "checkpoint": {"every": 3, "keep": STEPS}}
    config = build_config(models, run={"dir": str(run)}, zero={"stage": 0}, **sections)
    (models / "lost.toml").write_text(dumps(config))
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", str(models / "lost.toml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, "--gpus", "2"], env=environ, **pipes) as launcher:
        while launcher.poll() is None and not list(run.glob("checkpoints/step-*3")):
            time.sleep(0.05)
        ranks = {rank: started(rank) for rank in ranks_of(launcher.pid)}
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        launcher.communicate(timeout=HANG_S)
    assert launcher.returncode
    assert not any(started(rank) == start for rank, start in ranks.items())
    last = int(sorted(run.glob("checkpoints/step-*"))[-1].name[5:])
    assert 3 <= last < STEPS
    sections["optim"] |= {"steps": last + 1, "warmup_ratio": 0.0}
    train(build_config(models, run={"dir": str(run)}, zero={"stage": 0}, **sections), build_world())
    assert [row["step"] for row in rows(run)] == list(range(1, last + 2))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bin/mtllm", "deepspeed.launcher.runner", "deepspeed.launcher.launch"], 3),
        (["mtllm_engine.cli", "deepspeed.launcher.runner", "deepspeed.launcher.launch"], 3),
        (["own.py", "bin/deepspeed", "deepspeed.launcher.launch"], 2),
        (["bin/torchrun"], 1),
        (["torch.distributed.run"], 1),
        (["bin/deepspeed", "own.py"], 0),
        (["own.py"], 0),
    ],
)
def test_a_rank_leaves_with_the_launchers_above_it_and_nobody_else(
    tmp_path: Path, words: list[str], expected: int
):
    """Each starts the next; a script that starts a launcher may end before it."""
    command = []
    for word in ("rank.py", *reversed(words)):
        is_module = "/" not in word and word != "own.py" and word != "rank.py"
        path = tmp_path / (word.replace(".", "/") + ".py" if is_module else word)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TREE)
        for parent in path.relative_to(tmp_path).parents:
            (tmp_path / parent / "__init__.py").touch()  # before the packages of that name
        command = [*(("-u", "-m", word) if is_module else (str(path),)), *command]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path, "text": True}
    with subprocess.Popen([sys.executable, *command], env=environment, **pipes) as top:
        rank = int(top.stdout.readline())
        assert len(launchers(rank)) == expected
        assert all(started(each) == start for each, start in launchers(rank).items())


WATCHED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from mtllm_engine.training import launch
launch.GRACE_S = 0.5
parent = os.getppid()
launch.leave_with({parent: launch.started(parent)}, poll_s=0.05)
with launch.stop_requests(Path("nowhere")) as is_asked:
    print("ready", flush=True)
    while not is_asked():
        time.sleep(0.05)
    time.sleep(1.0)
    launch.wait_if_abandoned()
    print("saved", flush=True)
"""


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_that_was_asked_to_stop_still_saves(asked: bool):
    """Launchers that get SIGTERM are gone before their ranks are."""
    start = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True)"
    start += "; sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-c", start, sys.executable, "-c", WATCHED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    rank = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    if asked:
        os.kill(rank, signal.SIGTERM)
    out, errors = parent.communicate(timeout=60)
    assert out == ("saved\n" if asked else "")
    assert ("the launcher is gone" in errors) != asked
