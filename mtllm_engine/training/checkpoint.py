"""Checkpoints of what is trained: portable over world sizes, atomic, hashed.

`latest` is the newest complete one, `best` the one whose validation went best.
"""

import functools
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from mtllm_engine import files
from mtllm_engine.config import Config, flatten
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import Stream
from mtllm_engine.files import sha256_of
from mtllm_engine.model import peft
from mtllm_engine.model.merge import chain_fingerprint
from mtllm_engine.model.sums import open_start
from mtllm_engine.model.tensors import fingerprint, resolve, tokenizer_files
from mtllm_engine.model.weights import ADAPTERS, HEAD_FILE, RUN_FILES, file_of, saved_name
from mtllm_engine.training.engine import MOMENTS, PlainEngine, TrainedState, ZeroEngine
from mtllm_engine.world import World

FORMAT = {"format": "pt"}  # as transformers and PEFT mark their files
OPTIMIZER = "optimizer.safetensors"
NAMES = ("latest", "best")
MODEL = ("causal", "dtype", "quantization", "projection_bias", "encoder_prefix")
PACKS = ("mixture", "teacher_states", "lanes", "pack_documents", "pack_tokens")
TEXTS = ("max_length", "truncation", "parts", "pairs", "on_error")
IDENTITY = (
    *(f"model.{key}" for key in MODEL),
    *(f"data.{key}" for key in (*PACKS, *TEXTS)),
    *("lora.", "objective.", "run.seed", "task.name"),
)
"""Beginnings of the keys that a run must keep to be continued."""
READS = ("model.causal", "model.dtype", "model.projection_bias", "model.encoder_prefix")
READS += ("data.max_length", "data.truncation", "data.parts", "languages.fallback")
"""Keys that say how a text is read, whatever is learned from it."""
EARLIER = {"lora.rslora": False, "lora.train": "all", "data.parts": "whole", "data.pairs": 0.0}
EARLIER |= {"model.adapters": "", "model.encoder_prefix": ""}
"""Keys that older checkpoints lack, and what they were then."""


def save(
    config: Config,
    world: World,
    engine: PlainEngine | ZeroEngine,
    stream: Stream,
    step: int,
    score: float | None = None,
    bad_steps: int = 0,
) -> Path:
    """Saves the state after `step` steps as `checkpoints/step-00001000`; all ranks call it.

    Args:
        score: What validation said of this very state, higher being better; None: nothing.
        bad_steps: The last so many steps made no update.

    Raises:
        ValueError: A trained value is not finite, or the disk is full or refuses; earlier
            checkpoints are as they were.
    """
    lanes = {lane: state for part in world.gather(stream.state()) for lane, state in part.items()}
    state = engine.trained_state()
    record = {"step": step, "updates": engine.updates, "bad_steps": bad_steps}
    record |= {"lanes": lanes, "score": score}
    return world.on_main(lambda: _write(config, state, record))


class Progress(NamedTuple):
    """How far a run has got."""

    step: int = 0
    bad_steps: int = 0  # the last so many made no update


def restore(
    config: Config, world: World, engine: PlainEngine | ZeroEngine, stream: Stream
) -> Progress:
    """Loads `latest` into engine and stream, if the run has one.

    Raises:
        ValueError: The checkpoint is damaged, or of another model, corpus or lane count; the
            message says which.
    """
    folder, current = world.on_main(lambda: (_repaired(config), identity(config)))
    if folder is None:
        return Progress()
    state = world.together(lambda: read_record(folder))
    world.on_main(lambda: check_identity(folder, state["identity"], current))
    engine.load_trained_state(load_tensors(folder), state["updates"])
    stream.load_state({int(lane): lane_state for lane, lane_state in state["lanes"].items()})
    return Progress(state["step"], state["bad_steps"])


def steps_done(config: Config) -> int:
    """How many steps of a run are done, as `restore` will find it; 0 for a new one. On rank 0
    alone.

    Raises:
        ValueError: As `restore`.
    """
    folder = _repaired(config)
    if folder is None:
        return 0
    state = read_record(folder)
    check_identity(folder, state["identity"], identity(config))
    return state["step"]


def latest(folder: Path) -> Path | None:
    """The checkpoint of a `checkpoints` folder that a run is continued from, if any: what `latest`
    points to, or the newest complete one where it points to nothing."""
    if pointed := files.linked(folder / "latest"):
        return pointed
    complete = _complete(folder)
    return complete[max(complete)] if complete else None


def best(folder: Path) -> Path | None:
    """The checkpoint of a `checkpoints` folder with the highest score, of equal ones the later, if
    any has one."""
    complete = _complete(folder)
    scores = {step: _score(path) for step, path in complete.items()}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return complete[max(scored)[1]] if scored else None


def step_of(folder: Path) -> int:
    """The number of steps after which a checkpoint was saved.

    Raises:
        ValueError: Its record is damaged.
    """
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else read_record(folder)["step"]


def repair(folder: Path) -> None:
    """Makes `latest` and `best` of a `checkpoints` folder links to what they mean: in a copy they
    may be folders or nothing, and a killed run may have saved without pointing them there."""
    for path in map(folder.joinpath, NAMES):
        for step, complete in _complete(folder).items():
            if complete == path:  # the only copy of that step
                path.rename(folder / _name(step))
    for name, target in (("latest", latest(folder)), ("best", best(folder))):
        if target and files.linked(folder / name) != target.resolve():
            files.link(folder / name, target.name)


def follow(config: Config, find: Callable[[str], str] = str) -> Config:
    """With `latest` and `best` of other runs replaced by what they mean, where that is not what
    lies at their place, as in a copy or after a kill.

    Args:
        find: Where a checkpoint's name leads, such as a hub id.
    """

    def meant(name: str) -> str:
        return str(_target(Path(find(name)))) if name else ""

    model, stage1 = config.model, tuple(map(meant, config.evaluate.stage1))
    starts, teacher = tuple(map(meant, model.init_from)), meant(model.teacher)
    # A hub id of these stays: what is trained says on which adapters it stands, to anybody.
    chain = tuple(str(_target(Path(name))) for name in model.adapters)
    model = replace(model, init_from=starts, adapters=chain, teacher=teacher)
    return replace(config, model=model, evaluate=replace(config.evaluate, stage1=stage1))


def _target(path: Path) -> Path:
    if path.name not in NAMES:
        return path
    target = latest(path.parent) if path.name == "latest" else best(path.parent)
    is_there = target is None or (path.is_dir() and path.samefile(target))
    return path if is_there else target


def is_best(config: Config, world: World, score: float | None) -> bool:
    """Whether a score is above that of every checkpoint of the run; all ranks call it."""
    if score is None or not math.isfinite(score):
        return False
    top = world.on_main(lambda: best(_folder(config)))
    return top is None or score > world.on_main(lambda: _score(top))


def load_tensors(folder: Path) -> TrainedState:
    """The trained parameters of a checkpoint with their moments, fp32, by the stack's names."""
    values: dict[str, torch.Tensor] = {}
    for name in RUN_FILES:
        if (folder / name).is_file():
            values |= safetensors.torch.load_file(folder / name)
    state: TrainedState = {}
    for path, tensor in safetensors.torch.load_file(folder / OPTIMIZER).items():
        name, _, moment = path.rpartition("/")
        value = values[saved_name(name)]
        if value.shape != tensor.shape:  # what does not learn stands behind what does
            value = value[tuple(map(slice, tensor.shape))].contiguous()
        state.setdefault(name, {"value": value})[moment] = tensor
    return state


def identity(config: Config) -> dict[str, Any]:
    """What a run must keep to be continued: the models' and corpora's fingerprints and the keys
    that shape a step."""
    flat = {key: value for key, value in flatten(config).items() if key.startswith(IDENTITY)}
    model = config.model
    models = {
        "model.encoder": fingerprint_of(model.encoder),
        "model.decoder": fingerprint_of(model.decoder),
        "model.adapters": chain_of(model.adapters),
        "model.init_from": " + ".join(map(_run_fingerprint, model.init_from)),
        "model.teacher": _run_fingerprint(model.teacher),
    }
    corpora = [Manifest.load(path).fingerprint for path in config.data.train]
    return json.loads(json.dumps(flat | models | {"data.train": corpora}))


def teacher_identity(config: Config) -> dict[str, Any]:
    """What the teacher's states depend on besides the text: model, adapters, and how texts become
    tokens."""
    keys = ("model.causal", "model.dtype", "model.quantization", "model.encoder_prefix")
    keys += ("data.max_length", "data.truncation", "data.parts")  # what both sides' limit leaves
    flat, model = flatten(config), config.model
    tokenizers = [*map(tokenizer_files, map(resolve, (model.encoder, model.decoder)))]
    return {key: flat[key] for key in keys} | {
        "model.decoder": fingerprint_of(model.decoder),
        "model.adapters": chain_of(model.adapters),
        "model.teacher": _run_fingerprint(model.teacher),
        "tokenizers": " ".join(map(sha256_of, itertools.chain(*tokenizers))),
    }


@functools.cache
def fingerprint_of(model: str) -> str:
    """Of the model that the run began with: what a hub id means may change, and must not be fetched
    in mid-run."""
    return fingerprint(resolve(model))


@functools.cache
def chain_of(adapters: tuple[str, ...]) -> str:
    """Of `model.adapters`, as the run began with them."""
    return chain_fingerprint(adapters)


@functools.cache
def _run_fingerprint(folder: str) -> str:
    """Of another run's checkpoint, by its content; empty for none."""
    paths = [Path(folder) / name for name in RUN_FILES] if folder else []
    return " ".join(sha256_of(path) for path in paths if path.is_file())


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _repaired(config: Config) -> Path | None:
    """`latest` of a run, once all is in its place."""
    repair(_folder(config))
    return latest(_folder(config))


def _complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a folder, by step; of a step that a copy has under several names
    its own."""
    complete = {}
    for name in NAMES:
        path = folder / name
        if path.is_dir() and not path.is_symlink() and (record := record_of(path)):
            complete[record["step"]] = path
    for path in folder.glob("step-*/state.json"):
        if (number := path.parent.name.removeprefix("step-")).isdecimal():
            complete[int(number)] = path.parent
    return dict(sorted(complete.items()))


def _write(config: Config, state: TrainedState, record: dict[str, Any]) -> Path:
    folder = _folder(config)
    final = folder / _name(record["step"])
    for name, tensors in state.items():
        if not tensors["value"].isfinite().all():
            fix = "lower optim.lr and continue; earlier checkpoints are intact"
            raise ValueError(f"{name} is not finite after step {record['step']}; {fix}")
    if record["score"] is not None and not math.isfinite(record["score"]):
        record["score"] = None  # no measure of anything, and no JSON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):
            is_folder = leftover.is_dir() and not leftover.is_symlink()
            shutil.rmtree(leftover) if is_folder else leftover.unlink()
        # A folder of this very step is of a run that was rewound.
        with files.atomic_folder(final, replaces=True) as draft:
            contents = _contents(config, state)
            hashes = {name: write_file(draft / name, each) for name, each in contents.items()}
            about = {"identity": identity(config), "files": hashes}
            write_file(draft / "state.json", files.sealed(record | about))
        files.link(folder / "latest", final.name)
        top = best(folder)
        if top:
            files.link(folder / "best", top.name)
    except OSError as error:
        reason = f"{error.strerror or error}; earlier checkpoints are intact"
        raise ValueError(f"cannot save {final}: {reason}") from error
    # Later ones are of a run that was rewound, and do not crowd out this one.
    earlier = sorted(path for path in folder.glob("step-*") if path <= final)
    for old in earlier[: -config.checkpoint.keep]:
        if old != top:
            shutil.rmtree(old)
    return final


def _contents(config: Config, state: TrainedState) -> dict[str, bytes]:
    """File name -> bytes. The folder is also a PEFT adapter of the bare LLM without its head
    (`AutoModel`); a head that was copied comes along."""
    values: dict[str, dict[str, torch.Tensor]] = {}
    moments: dict[str, torch.Tensor] = {}
    _, frozen = open_start(config, learns=True)
    for name, tensors in state.items():
        saved, value = saved_name(name), tensors["value"].contiguous()
        if frozen and file_of(saved) == ADAPTERS:
            value = frozen.beside(value, saved)
        values.setdefault(file_of(saved), {})[saved] = value
        moments |= {f"{name}/{key}": tensors[key].contiguous() for key in MOMENTS}
    contents = {name: safetensors.torch.save(part, FORMAT) for name, part in values.items()}
    contents[OPTIMIZER] = safetensors.torch.save(moments)
    if ADAPTERS in contents:
        model = config.model
        about = peft.peft_config(
            config.lora, model.decoder, causal=model.causal, chain=model.adapters
        )
        contents[peft.FILE] = json.dumps(about, indent=1).encode()
    copied = Path(config.model.teacher) / HEAD_FILE
    if config.model.teacher and copied.is_file():
        contents[HEAD_FILE] = copied.read_bytes()
    return contents


def write_file(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        files.sync(file)
    return hashlib.sha256(content).hexdigest()


def record_of(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's record, if it is the one that was written."""
    try:
        return files.unsealed((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        return None


def _score(folder: Path) -> float | None:
    """A checkpoint's score, if it has one and its record is sound."""
    score = (record_of(folder) or {}).get("score")
    return score if isinstance(score, float | int) and math.isfinite(score) else None


def read_record(folder: Path, fix: str = "", names: Collection[str] = ()) -> dict[str, Any]:
    """A checkpoint's record, once its files have been found to be those that were written.

    Args:
        fix: What the user can do where they are not; empty: to continue, without it.
        names: Of the files that will be read; empty: all.
    """
    fix = fix or f"remove {folder} to continue from the checkpoint before it"
    try:
        state = files.unsealed((folder / "state.json").read_bytes())
        hashes = {
            name: sha256 for name, sha256 in state["files"].items() if name in names or not names
        }
        hashes |= {name: "" for name in names if (folder / name).exists() and name not in hashes}
        damaged = [name for name, sha256 in hashes.items() if sha256_of(folder / name) != sha256]
    except OSError as error:
        raise ValueError(f"{folder} is not a complete checkpoint ({error}); {fix}") from error
    except ValueError:
        damaged = ["state.json"]
    if damaged:
        raise ValueError(f"{folder / damaged[0]} is damaged; {fix}")
    return state


def check_identity(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises: ValueError: A run's checkpoint was saved under another identity than this."""
    saved = EARLIER | saved
    for key, value in current.items():
        if saved.get(key) != value:
            before, now = (_short(item) for item in (saved.get(key), value))
            change = f"{key} was {before} and is {now}; restore it or change run.dir"
            raise ValueError(f"cannot continue {folder}: {change}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
