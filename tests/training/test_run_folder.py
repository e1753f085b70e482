"""A run's folder: who works in it, copies of it, and starting again what is done or was killed."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine import files, train
from mtllm_engine.config import Config, load
from mtllm_engine.training import checkpoint, lock
from mtllm_engine.training import step as training_step
from mtllm_engine.training.engine import INSTEAD, check_deepspeed
from mtllm_engine.training.lock import NAME, sole_owner
from tests.support.machine import ROOT
from tests.support.recipes import error_of
from tests.support.stages import losses, rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = build_world()
SCORES = [None, 0.0, -0.5, 0.7, 1, float("nan"), float("inf"), -float("inf")]
KINDS = ["links", "folders", "files", "nothing", "half", "broken"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 40)
    build_corpus(folder / "held_out", 8, seed=1)
    return folder


def configure(models: Path, run: Path, **sections) -> Config:
    tree = {
        "run": {"dir": str(run)},
        "zero": {"stage": 0},
        "validation": {"corpus": str(models / "held_out"), "every": 2},
        "checkpoint": {"every": 2},
        "optim": {"steps": 6, "warmup_ratio": 0.0},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return build_config(models, **tree)


def learn(models: Path, run: Path, **sections) -> None:
    train.train(configure(models, run, **sections), WORLD)


@pytest.fixture(scope="module")
def done(models: Path) -> Path:
    """A finished run that nobody changes."""
    learn(models, models / "done")
    return models / "done"


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / "run", symlinks=True)


def spoil(run: Path, kind: str) -> None:
    """What copies and shares make of a run's links."""
    for path in (run / "checkpoints" / "latest", run / "checkpoints" / "best"):
        target = path.resolve()
        if kind == "links":
            continue
        path.unlink()
        if kind == "folders":
            shutil.copytree(target, path)
        elif kind == "files":
            path.write_text(target.name)
        elif kind == "half":  # a copy that was cut
            path.mkdir()
            (path / "optimizer.safetensors").write_bytes(b"half")
        elif kind == "broken":
            path.symlink_to("step-00000999")


@pytest.mark.parametrize(
    ("kind", "has_links"),
    [*((kind, True) for kind in KINDS), ("links", False), ("folders", False), ("files", False)],
)
def test_any_copy_continues_and_saves(models, run, done, monkeypatch, kind: str, has_links: bool):
    spoil(run, kind)
    if not has_links:
        monkeypatch.setattr(Path, "symlink_to", without_links)
    learn(models, run, optim={"steps": 8})
    folder = run / "checkpoints"
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 9))
    assert losses(run)[:6] == losses(done)
    assert checkpoint.latest(folder).name == "step-00000008"
    for name in ("latest", "best"):
        assert (folder / name).is_symlink() or (folder / name).is_file()
        assert files.linked(folder / name) == getattr(checkpoint, name)(folder).resolve()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def without_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_copy_of_nothing_but_latest_continues(models, run):
    whole = run.with_name("whole") / "checkpoints"
    shutil.copytree(run / "checkpoints", whole, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(whole / "latest", run / "checkpoints" / "latest")
    learn(models, run, optim={"steps": 8})
    assert names(run) == ["best", "latest", "step-00000006", "step-00000008"]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", ["link", "file"])
def test_whoever_points_latest_back_rewinds_also_without_links(models, run, kind: str):
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("step-00000004") if kind == "link" else latest.write_text("step-00000004\n")
    assert checkpoint.latest(run / "checkpoints").name == "step-00000004"
    learn(models, run, optim={"steps": 5})
    assert checkpoint.latest(run / "checkpoints").name == "step-00000005"


def test_a_run_ends_with_a_line_that_says_how(models, tmp_path, capsys):
    learn(models, tmp_path / "run", optim={"steps": 2})
    last = capsys.readouterr().out.splitlines()[-1]
    report = tmp_path / "run" / "report.html"
    assert last == f"done, 2 steps: {report}, and `mtllm show {tmp_path / 'run'}` says what it is"
    assert report.is_file()


@pytest.mark.parametrize("text", ["", "..", ".", "../../x", "/", "step-99", "a\nb", "x" * 5000])
def test_what_a_file_latest_says_is_a_neighbour_or_nothing(tmp_path, text: str):
    (tmp_path / "latest").write_text(text)
    assert files.linked(tmp_path / "latest") is None


def test_a_finished_run_says_so_and_what_changed_and_stays(models, run, monkeypatch, capsys):
    monkeypatch.setattr(train, "build_stack", lambda *_, **__: pytest.fail("a model was built"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "STOP").touch()
    learn(models, run, optim={"lr": 0.5, "steps": 5}, zero={"stage": 3}, validation={"every": 1})
    said = capsys.readouterr()
    assert said.out == f"nothing to do: 6 of 5 steps are done in {run}\n"
    assert said.err == (
        "mtllm: warning: changed since: optim.steps was 6 and is 5; optim.lr was 0.001 and is 0.5; "
        "zero.stage was 0 and is 3; validation.every was 2 and is 1; it did not apply: "
        "set run.dir to train with it\n"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert load(run / "config.toml").optim.lr == 1e-3


@pytest.mark.parametrize("stage", [0, "auto"])
def test_a_finished_run_without_changes_says_one_line(models, run, capsys, stage: int | str):
    (run / "report.html").unlink()  # killed before it was written
    learn(models, run, zero={"stage": stage})  # the run had 0, and "auto" would be 3 here
    said = capsys.readouterr()
    assert said.out == f"nothing to do: 6 of 6 steps are done in {run}\n" and not said.err
    assert (run / "report.html").is_file()


def test_a_finished_run_of_another_model_is_refused(models, run):
    message = error_of(lambda: learn(models, run, model={"causal": True}))
    assert "model.causal was false and is true; restore it or change run.dir" in message


def test_best_is_repaired_by_the_next_start_also_where_nothing_is_left_to_do(models, run):
    """Killed between the links of the last save."""
    folder = run / "checkpoints"
    expected = checkpoint.best(folder)
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-00000002")
    model = {"init_from": str(folder / "best"), "teacher": str(folder / "latest")}
    followed = checkpoint.follow(configure(models, run, model=model)).model
    assert followed.init_from == (str(expected),) and followed.teacher == model["teacher"]
    learn(models, run)
    assert (folder / "best").resolve() == expected.resolve()
    assert checkpoint.follow(configure(models, run, model=model)).model.init_from == (
        model["init_from"],
    )


@given(st.lists(st.sampled_from(SCORES), min_size=1, max_size=4), st.data())
def test_best_is_the_highest_score_of_the_sound_records(tmp_path_factory, scores, data):
    """NaN and infinities are none; of a record with another bit nothing is believed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    flipped = data.draw(st.sets(st.integers(1, len(scores)), max_size=len(scores) - 1))
    for step, score in enumerate(scores, start=1):
        (folder / f"step-{step:08d}").mkdir()
        content = bytearray(files.sealed({"step": step, "score": score}))
        if step in flipped:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        (folder / f"step-{step:08d}" / "state.json").write_bytes(content)
    sound = {step: s for step, s in enumerate(scores, start=1) if step not in flipped}
    finite = [(s, step) for step, s in sound.items() if s is not None and abs(s) < float("inf")]
    found = checkpoint.best(folder)
    assert (found and checkpoint.step_of(found)) == (max(finite)[1] if finite else None)


@pytest.mark.parametrize("score", [float("nan"), -float("inf")])
def test_a_score_that_is_no_number_is_not_saved_as_best(models, tmp_path, monkeypatch, score):
    measured = iter([0.0, score, 0.1, score])  # before the first step, after 2, 4 and the last
    monkeypatch.setattr(training_step, "validate", lambda *_: (None, 8))
    stack = train.build_stack

    def measuring(*arguments, **options):
        built = stack(*arguments, **options)
        built[0].objective.measures = lambda moments: {
            "fvu": 1.0 if moments is not None else -next(measured)
        }
        return built

    monkeypatch.setattr(train, "build_stack", measuring)
    learn(models, tmp_path, checkpoint={"every": 1000, "keep": 5})
    assert names(tmp_path) == ["best", "latest", "step-00000004", "step-00000006"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000004"
    last = json.loads((tmp_path / "checkpoints" / "latest" / "state.json").read_text())
    assert last["score"] is None


OWNER = """
import sys, time
from pathlib import Path
from mtllm_engine.training.lock import sole_owner
from mtllm_engine.world import World
with sole_owner(Path(sys.argv[1]), World(rank=0, size=1, local_rank=0, device=None)):
    print("here", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def owner_of(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that works there."""
    command = [sys.executable, "-c", OWNER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        assert process.stdout.readline() == "here\n"
        yield process


def test_two_runs_in_one_folder_are_one_too_many(models, run, monkeypatch):
    """The second is refused before it writes anything; a killed one's place is free at once."""
    monkeypatch.setattr(lock, "WAIT_S", 0.3)
    with owner_of(run) as owner:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        message = error_of(lambda: learn(models, run, optim={"steps": 8}))
        assert message.startswith(f"{run}: another run (process {owner.pid} on ")
        assert message.endswith(
            f"works here; wait for it or set run.dir; if it is dead, remove {run / NAME}"
        )
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        owner.kill()
        owner.wait()
        assert (run / NAME).is_file()
        learn(models, run, optim={"steps": 8})
    assert not (run / NAME).exists()


def test_a_run_waits_for_one_that_is_about_to_leave(tmp_path):
    with owner_of(tmp_path) as owner:
        threading.Timer(0.5, owner.stdin.close).start()
        with sole_owner(tmp_path, WORLD):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_folder_that_a_refused_run_made_goes_with_it(models, tmp_path):
    run = tmp_path / "runs" / "first"
    data = {"train": str(models / "absent")}
    assert "no manifest.json" in error_of(lambda: learn(models, run, data=data))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_locked", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize(
    ("changed", "is_live"),
    [
        ({}, True),
        ({"start": "1"}, False),  # another process has its number now
        ({"process": 1 << 22}, False),
        ({"host": "elsewhere"}, False),
        ({"boot": "earlier"}, False),
        ({"host": "elsewhere", "writes": True}, True),
    ],
)
def test_owners_that_left_no_lock(tmp_path, monkeypatch, is_locked: bool, changed, is_live: bool):
    """What the file says decides where the kernel's lock does not: on another machine, or on a
    file system without locks."""
    monkeypatch.setattr(lock, "WAIT_S", 0.0)
    monkeypatch.setattr(lock, "STILL_S", 0.4)
    if not is_locked:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: no_locks())
    owner, path = lock._this_process(), tmp_path / NAME
    writes = changed.pop("writes", False) if (changed := dict(changed)) else False
    path.write_text(json.dumps(owner | changed | {"beat": 1.0}))
    if writes:
        beat = json.dumps(owner | changed | {"beat": 2.0})
        threading.Timer(0.1, lambda: path.write_text(beat)).start()
    if is_live and not (is_locked and not changed):  # a free lock here: that process has left
        assert "works here" in error_of(lambda: take(tmp_path))
        assert json.loads(path.read_text())["start"] == owner["start"]
    else:
        take(tmp_path)
        assert not path.exists()


def no_locks() -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def take(folder: Path) -> None:
    with sole_owner(folder, WORLD):
        assert json.loads((folder / NAME).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"process": "x"}', b"\xff" * 50])
def test_a_damaged_lock_that_nobody_holds_is_taken(tmp_path, monkeypatch, content: bytes):
    monkeypatch.setattr(lock, "STILL_S", 0.05)
    (tmp_path / NAME).write_bytes(content)
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    with sole_owner(tmp_path, WORLD):
        first = lock._read(tmp_path / NAME)
        wait = threading.Event()
        while (now := lock._read(tmp_path / NAME)) in (first, {}):
            wait.wait(0.02)
        assert {**now, "beat": 0} == {**first, "beat": 0} and now["beat"] > first["beat"]


HABITS = [
    ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "optim.lr"),
    ("scheduler", {"type": "WarmupLR"}, "optim.warmup_ratio"),
    ("bf16", {"enabled": True}, "model.dtype"),
    ("bf16", {"enabled": "auto"}, "model.dtype"),
    ("fp16", {"enabled": True, "loss_scale": 0}, "model.dtype"),
    ("gradient_accumulation_steps", 4, "memory.max_tokens"),
    ("gradient_accumulation_steps", "auto", "memory.max_tokens"),
    ("train_micro_batch_size_per_gpu", "auto", "memory.max_tokens"),
    ("train_batch_size", 256, "data.lanes"),
    ("gradient_clipping", 1.0, "optim.clip"),
    ("activation_checkpointing", {"partition_activations": True}, "memory.recompute"),
    ("zero_optimization.stage", 2, "zero.stage"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, "memory.recompute"),
    ("zero_optimization.cpu_offload", True, "memory.recompute"),
    ("zero_optimization.zero_hpz_partition_size", 8, 'zero.secondary = "node"'),
    ("zero_optimization.zero_quantized_weights", True, "model.quantization"),
    ("zero_optimization.reduce_bucket_size", "auto", "leave the key out"),
    ("zero_optimization.overlap_comm", "auto", "leave the key out"),
    ("zero_optimisation", {"reduce_bucket_size": 1}, "did you mean zero_optimization?"),
    ("hybrid_engine", {"enabled": True}, "leave it out"),
]


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("key", "value", "instead"), HABITS)
def test_what_deepspeed_is_told_from_habit_is_one_line(models, tmp_path, key, value, instead):
    config = configure(models, tmp_path / "run", deepspeed=nested(key, value))
    message = error_of(lambda: train.train(config, WORLD))
    assert message.startswith(f"deepspeed.{key}") and instead in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"wall_clock_breakdown": True, "steps_per_print": 10, "comms_logger": {"enabled": True}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
        {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1},
    ],
)
def test_what_works_stays_possible(table: dict):
    check_deepspeed(table)


@given(st.dictionaries(st.sampled_from(sorted(INSTEAD)), st.sampled_from([7, "auto"])))
def test_every_habit_is_refused_wherever_it_stands(habits: dict):
    table: dict = {"wall_clock_breakdown": True}
    for key, value in random.Random(0).sample(sorted(habits.items()), len(habits)):
        section, _, last = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[last] = value
    if habits:
        assert error_of(lambda: check_deepspeed(table)).startswith("deepspeed.")


def test_what_deepspeed_refuses_names_the_key(models, tmp_path):
    from mtllm_engine.world import connect

    table = {"zero_optimization": {"reduce_bucket_size": "large"}}
    sections = {"zero": {"stage": 3}, "deepspeed": table}
    world = connect()
    try:
        message = error_of(lambda: train.train(configure(models, tmp_path, **sections), world))
    finally:
        world.close()
    assert message.startswith("deepspeed.zero_optimization.reduce_bucket_size: DeepSpeed refuses: ")
    assert "valid integer" in message
