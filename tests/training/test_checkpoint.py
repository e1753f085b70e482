import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtllm_engine import train
from mtllm_engine.config import Config
from mtllm_engine.data.stream import Stream, agree, build_stream
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.training import checkpoint
from mtllm_engine.training import step as training_step
from mtllm_engine.training.engine import PlainEngine, TrainedState, build_engine, shard
from mtllm_engine.training.step import train_step
from tests.support.stages import rows
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

WORLD = build_world()
FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "projection.safetensors",
    "state.json",
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run saves and restores, in a folder of its own."""

    config: Config
    engine: PlainEngine
    stream: Stream

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir) / "checkpoints"

    def save(self, step: int) -> Path:
        return checkpoint.save(self.config, WORLD, self.engine, self.stream, step)

    def restore(self) -> int:
        return checkpoint.restore(self.config, WORLD, self.engine, self.stream).step

    def state(self) -> tuple[TrainedState, dict]:
        return self.engine.trained_state(), self.stream.state()

    def train_to(self, step: int) -> None:
        """Stands for training: numbers of their own in all that is trained, and packs consumed."""
        self.engine.load_trained_state(random_state(self.engine, step), step)
        self.next_keys()

    def train_steps(self, first: int, end: int) -> None:
        with contextlib.closing(self.stream) as stream:
            for step in range(first, end):
                global_batch = agree(stream, WORLD, self.config.memory.max_tokens)
                train_step(self.config, WORLD, self.engine, global_batch, step)

    def next_keys(self) -> list[str]:
        """The documents of the next step."""
        with contextlib.closing(self.stream) as stream:
            return [document.key for pack in stream.next_step() for document in pack.documents]

    def with_options(self, **sections) -> "Run":
        """The same run, configured otherwise."""
        changed = {
            name: replace(getattr(self.config, name), **values) for name, values in sections.items()
        }
        return replace(self, config=replace(self.config, **changed))


def random_state(engine: PlainEngine, seed: int) -> TrainedState:
    generator = torch.Generator().manual_seed(seed)
    trained = {
        name: parameter
        for name, parameter in engine.stack.named_parameters()
        if parameter.requires_grad
    }
    return {
        name: {
            key: torch.rand(parameter.shape, generator=generator)
            for key in ("value", "exp_avg", "exp_avg_sq")
        }
        for name, parameter in trained.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with an encoder, a decoder and a corpus, and others of each."""
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder")
    build_encoder(folder / "other_encoder", layers=1)
    build_decoder(folder / "decoder")
    build_decoder(folder / "other_decoder", layers=2)
    build_corpus(folder / "train", 40)
    build_corpus(folder / "other_train", 40, seed=1)
    return folder


def start(models: Path, folder: Path, **sections) -> Run:
    config = build_config(models, run={"dir": str(folder)}, zero={"stage": 0}, **sections)
    stack, weights = build_stack(config)
    engine = build_engine(config, shard(stack, weights, config, WORLD), WORLD)
    stream = build_stream(config.data, build_tokenizer(config, stack), WORLD, seed=config.run.seed)
    return Run(config=config, engine=engine, stream=stream)


@pytest.fixture(scope="module")
def engine_and_stream(models, tmp_path_factory) -> Run:
    return start(models, tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(engine_and_stream, tmp_path) -> Run:
    """A run without checkpoints."""
    return engine_and_stream.with_options(run={"dir": str(tmp_path / "run")})


def is_same(state: tuple[TrainedState, dict], other: tuple[TrainedState, dict]) -> bool:
    """Bitwise."""
    (trained, lanes), (other_trained, other_lanes) = state, other
    keys = {(name, key) for name, tensors in trained.items() for key in tensors}
    other_keys = {(name, key) for name, tensors in other_trained.items() for key in tensors}
    same_tensors = all(
        torch.equal(trained[name][key], other_trained[name][key]) for name, key in keys & other_keys
    )
    return keys == other_keys and same_tensors and lanes == other_lanes


def saved_names(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def error_of(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"projection_bias": False}},
        {"lora": {"target_modules": ["q_proj", "down_proj"], "rank": 1}},
        {"lora": {"target_modules": []}},
    ],
    ids=["all", "no bias", "two linears", "no adapters"],
)
def test_what_is_saved_is_restored(models, tmp_path, sections):
    first, second = (start(models, tmp_path, **sections) for _ in range(2))
    for step in (1, 2, 3):
        first.train_to(step)
    first.save(3)
    second.train_to(1)
    assert not is_same(second.state(), first.state())
    assert second.restore() == 3
    assert is_same(second.state(), first.state())
    assert second.next_keys() == first.next_keys()


def test_continued_run_is_the_one_that_never_stopped(models, tmp_path):
    """Bitwise; also from a folder that was copied without its link `latest`."""
    whole, continued = (start(models, tmp_path, lora={"dropout": 0.1}) for _ in range(2))
    whole.train_steps(0, 2)
    whole.save(2)
    whole.train_steps(2, 4)
    (whole.folder / "latest").unlink()
    continued.train_steps(0, 1)
    assert continued.restore() == 2
    assert not is_same(whole.state(), continued.state())
    continued.train_steps(2, 4)
    assert is_same(whole.state(), continued.state())


def test_new_run_starts_at_the_beginning(run):
    run.train_to(1)
    before = run.state()
    assert run.restore() == 0
    assert is_same(run.state(), before) and not run.folder.exists()


def test_holds_what_is_trained_once_and_in_fp32(run):
    run.train_to(1)
    folder = run.save(1)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    values, moments = {}, safetensors.torch.load_file(folder / "optimizer.safetensors")
    for name in ("adapter_model", "projection"):
        values |= safetensors.torch.load_file(folder / f"{name}.safetensors")
    assert {tensor.dtype for tensor in [*values.values(), *moments.values()]} == {torch.float32}
    assert len(values) == len(run.state()[0]) and len(moments) == 2 * len(values)


def test_latest_is_the_newest_and_the_last_k_are_kept(run):
    run = run.with_options(checkpoint={"keep": 2})
    for step in (1, 2, 10, 100):
        run.train_to(step)
        folder = run.save(step)
        assert (run.folder / "latest").resolve() == folder == checkpoint.latest(run.folder)
    assert saved_names(run) == ["latest", "step-00000010", "step-00000100"]
    assert run.restore() == 100


def test_the_best_of_all_validations_is_saved(models, tmp_path, monkeypatch):
    """Not only of those that a regular save meets; before a run was stopped, too."""
    scores = {0: 0.9, 1: 0.1, 2: 0.3, 3: 0.2, 4: 0.25, 5: 0.29, 6: 0.1}
    validated = iter(scores.values())
    monkeypatch.setattr(training_step, "validate", lambda *_: (moments_of(next(validated)), 1))
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(args[4]) or save(*args))
    sections = {
        "run": {"dir": str(tmp_path)},
        "validation": {"corpus": str(models / "train"), "every": 1},
        "checkpoint": {"every": 1000, "keep": 1},
    }
    for steps, expected, left in ((4, [1, 2, 4], (2, 4)), (6, [1, 2, 4, 6], (2, 6))):
        train.train(
            build_config(models, **sections, optim={"steps": steps}, zero={"stage": 0}), WORLD
        )
        assert saved == expected
        names = [f"step-{step:08d}" for step in left]
        assert sorted(path.name for path in tmp_path.glob("checkpoints/*-*")) == names
        assert (tmp_path / "checkpoints" / "best").resolve().name == names[0]
    looks = [row for row in rows(tmp_path) if "validation_fvu" in row]
    assert {row["step"]: -row["validation_fvu"] for row in looks} == scores


def moments_of(score: float) -> torch.Tensor:
    """Of distillation: nothing was scored; one span, whose error is -score and variance 1."""
    return torch.tensor([0.0, 0.0, 1.0, -score, 0.0, 1.0, 0.0], dtype=torch.float64)


def test_moved_run_folder_is_continued(run, tmp_path):
    run.train_to(1)
    run.save(1)
    Path(run.config.run.dir).rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "checkpoints" / "latest" / "state.json").is_file()
    assert run.with_options(run={"dir": str(tmp_path / "moved")}).restore() == 1


def test_run_that_was_rewound_keeps_what_it_saves(run):
    """Whoever points `latest` back leaves later checkpoints, which must not crowd out the
    new ones.
    """
    run = run.with_options(checkpoint={"keep": 2})
    for step in (10, 20, 30):
        run.train_to(step)
        run.save(step)
    (run.folder / "latest").unlink()
    (run.folder / "latest").symlink_to("step-00000020")
    assert run.restore() == 20
    for step in (22, 24, 26):
        run.train_to(step)
        run.save(step)
        assert run.restore() == step
    assert saved_names(run) == ["latest", "step-00000024", "step-00000026", "step-00000030"]


@pytest.mark.parametrize("is_linked", [True, False])
def test_leftovers_of_a_killed_run_are_harmless(run, is_linked):
    """A partial folder, and checkpoints of which half is gone; also where there is no `latest`."""
    run.train_to(4)
    run.save(4)
    for name in (".step-00000006.4711.partial", "step-00000002", "step-00000008"):
        (run.folder / name).mkdir()
        (run.folder / name / "optimizer.safetensors").write_bytes(b"half")
    (run.folder / ".latest.4711.partial").symlink_to("step-00000006")
    if not is_linked:
        (run.folder / "latest").unlink()
    assert run.restore() == 4
    run.save(6)
    assert run.restore() == 6
    assert [name for name in saved_names(run) if name.startswith(".")] == []


class Killed(BaseException):
    """Nothing cleans up after a kill: no handler of the code under test catches this."""


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITES = [(os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename"), (Path, "symlink_to")]


@contextlib.contextmanager
def failing_from(number: int, error: BaseException) -> Iterator[list[str]]:
    """Lets fewer than `number` of the system calls of a save through; yields the names of all that
    were tried.
    """
    tried: list[str] = []

    def failing(name, call):
        def wrapped(*arguments, **options):
            tried.append(name)
            if len(tried) >= number:
                raise error
            return call(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, failing(name, getattr(owner, name)))
        yield tried


def num_writes(run: Run) -> int:
    """How many system calls a save makes that may fail, but for those of a run's first."""
    run.train_to(1)
    run.save(1)
    with failing_from(1 << 30, FULL_DISK) as tried:
        run.save(2)
    shutil.rmtree(run.folder)
    assert tried.count("fsync") >= len(FILES) and {name for _, name in WRITES} == set(tried)
    return len(tried)


@pytest.mark.parametrize("error", [FULL_DISK, Killed()], ids=["full disk", "killed"])
def test_failure_at_any_write_leaves_the_checkpoint_before(run, error):
    """Only the last write, which makes `latest` durable, comes when the new one is complete."""
    restored = []
    for number in range(1, num_writes(run) + 1):
        states = {}
        for step in (2, 4):
            run.train_to(step)
            states[step] = run.state()
            if step == 2:
                run.save(step)
        with failing_from(number, error), pytest.raises((ValueError, Killed)) as raised:
            run.save(4)
        if error is FULL_DISK:
            assert "step-00000004: No space left on device; earlier checkpoints are intact" in str(
                raised.value
            )
            assert not any(
                name.endswith("partial") for name in saved_names(run) if name.startswith(".step")
            )
        assert (run.folder / "latest" / "state.json").is_file()
        restored.append(run.restore())
        assert is_same(run.state(), states[restored[-1]])
        run.save(6)
        assert run.restore() == 6 and not any(name.startswith(".") for name in saved_names(run))
        shutil.rmtree(run.folder)
    assert restored == (len(restored) - 1) * [2] + [4]


@pytest.fixture(scope="module")
def saved(engine_and_stream, tmp_path_factory) -> tuple[Run, Path]:
    """A run and its only checkpoint."""
    run = engine_and_stream.with_options(run={"dir": str(tmp_path_factory.mktemp("saved"))})
    run.train_to(3)
    return run, run.save(3)


@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bit_is_refused(saved, name, share, bit):
    run, folder = saved
    sound = (folder / name).read_bytes()
    flipped = bytearray(sound)
    flipped[int(share * len(sound))] ^= 1 << bit
    (folder / name).write_bytes(flipped)
    try:
        message = error_of(run.restore)
    finally:
        (folder / name).write_bytes(sound)
    assert (
        message
        == f"{folder / name} is damaged; remove {folder} to continue from the checkpoint before it"
    )


@pytest.mark.parametrize("name", FILES)
def test_cut_file_is_refused(run, name):
    run.train_to(1)
    folder = run.save(1)
    os.truncate(folder / name, 100)
    assert error_of(run.restore).startswith(
        f"{folder / name} is damaged; remove {folder} to continue"
    )


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused_and_the_advice_works(run, name):
    for step in (1, 2):
        run.train_to(step)
        folder = run.save(step)
    (folder / name).unlink()
    message = error_of(run.restore)
    assert message.startswith(f"{folder} is not a complete checkpoint (") and name in message
    assert message.endswith(f"; remove {folder} to continue from the checkpoint before it")
    shutil.rmtree(folder)
    assert run.restore() == 1


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("model", "encoder", "other_encoder", 'model.encoder was "'),
        ("model", "decoder", "other_decoder", 'model.decoder was "'),
        ("model", "causal", True, "model.causal was false and is true"),
        ("model", "projection_bias", False, "model.projection_bias was true and is false"),
        ("model", "encoder_prefix", "query: ", 'model.encoder_prefix was "" and is "query: "'),
        ("data", "train", ("other_train",), 'data.train was ["'),
        ("data", "train", ("train", "train"), 'data.train was ["'),
        ("data", "lanes", 7, "data.lanes was 8 and is 7"),
        ("data", "pack_documents", 3, "data.pack_documents was 2 and is 3"),
        ("data", "max_length", 32, "data.max_length was 64 and is 32"),
        ("data", "truncation", "independent", 'data.truncation was "aligned" and is "independent"'),
        ("data", "parts", "lines", 'data.parts was "whole" and is "lines"'),
        ("data", "on_error", "skip", 'data.on_error was "raise" and is "skip"'),
        ("lora", "rank", 8, "lora.rank was 4 and is 8"),
        ("lora", "target_modules", ("q_proj",), 'lora.target_modules was ["q_proj", '),
        ("run", "seed", 1, "run.seed was 0 and is 1"),
    ],
)
def test_checkpoint_of_another_run_is_refused_with_the_reason(
    saved, models, section, key, value, reason
):
    run, folder = saved
    before = run.state()
    message = error_of(run.with_options(**{section: {key: in_folder(models, value)}}).restore)
    assert message.startswith(f"cannot continue {folder}: {reason}")
    assert message.endswith("; restore it or change run.dir")
    assert is_same(run.state(), before)


def test_a_changed_tensor_in_the_middle_of_a_large_file_is_another_model(run, models, tmp_path):
    file = shutil.copytree(models / "decoder", tmp_path / "decoder") / "model.safetensors"
    # 2 MiB before and behind, which no model reads.
    around = {name: torch.zeros(1 << 19) for name in ("a", "z")}
    tensors = around | load_file(file)
    save_file(tensors, file)
    run = run.with_options(model={"decoder": str(file.parent)})
    run.train_to(1)
    run.save(1)
    checkpoint.fingerprint_of.cache_clear()
    assert run.restore() == 1
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, file)
    checkpoint.fingerprint_of.cache_clear()
    assert 'model.decoder was "' in error_of(run.restore)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_tokenizer_without_its_last_piece_is_another_model(run, models, tmp_path, side):
    path = shutil.copytree(models / side, tmp_path / side) / "tokenizer.json"
    run = run.with_options(model={side: str(path.parent)})
    run.train_to(1)
    run.save(1)
    checkpoint.fingerprint_of.cache_clear()
    assert run.restore() == 1
    table = json.loads(path.read_text())
    pieces = table["model"].get("merges") or table["model"]["vocab"]
    pieces.pop() if isinstance(pieces, list) else pieces.popitem()
    path.write_text(json.dumps(table))
    checkpoint.fingerprint_of.cache_clear()
    assert f'model.{side} was "' in error_of(run.restore)


def in_folder(models: Path, value):
    """Names of models and corpora become paths."""
    if isinstance(value, tuple):
        return tuple(in_folder(models, item) for item in value)
    return str(models / value) if isinstance(value, str) and (models / value).exists() else value


def test_what_does_not_shape_a_step_may_change(saved, models, tmp_path):
    """So may the places of models and corpora, as long as their content is the same."""
    run, _ = saved
    shutil.copytree(models, tmp_path / "copy")
    moved = {side: str(tmp_path / "copy" / side) for side in ("encoder", "decoder")}
    changed = run.with_options(
        model=moved,
        data={"train": (str(tmp_path / "copy" / "train"),), "prefetch": 5},
        optim={"lr": 1.0, "steps": 99},
        memory={"max_tokens": 999},
        zero={"stage": 3},
        checkpoint={"keep": 9},
    )
    assert changed.restore() == 3
