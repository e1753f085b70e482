"""Checkpoints of what is trained: portable over world sizes, atomic, hashed.

`latest` is the newest complete one, `best` the one whose validation went best.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mtllm_engine.config import Config, flatten
from mtllm_engine.data.shards import Manifest, sha256_of
from mtllm_engine.data.stream import Stream
from mtllm_engine.engine import MOMENTS, PlainEngine, TrainedState, ZeroEngine
from mtllm_engine.model.pretrained import RUN_FILES, fingerprint, resolve, saved_name
from mtllm_engine.world import World

IDENTITY = ("model.causal", "model.dtype", "model.base", "model.projection_bias", "lora.", "run.seed", "objective.")
IDENTITY += ("task.name", "data.weights", "data.lanes", "data.targets", "data.pack_documents", "data.pack_tokens")
IDENTITY += ("data.max_length", "data.truncation", "data.on_error")


def save(
    config: Config,
    world: World,
    engine: PlainEngine | ZeroEngine,
    stream: Stream,
    step: int,
    score: float | None = None,
) -> Path:
    """Saves the state after `step` steps as `checkpoints/step-00001000`; all ranks call it.

    Args:
        score: What validation said of this very state, higher being better; None: nothing.

    Raises:
        ValueError: The disk is full or refuses; earlier checkpoints are as they were.
    """
    lanes = {lane: state for part in world.gather(stream.state()) for lane, state in part.items()}
    state = engine.trained_state()
    return world.on_main(lambda: _write(config, state, lanes, step, score))


def restore(config: Config, world: World, engine: PlainEngine | ZeroEngine, stream: Stream) -> int:
    """Loads `latest` into engine and stream, if the run has one; returns the number of steps done.

    Raises:
        ValueError: The checkpoint is damaged, or of another model, corpus or lane count; the message says which.
    """
    folder, current = world.on_main(lambda: (latest(_folder(config)), identity(config)))
    if folder is None:
        return 0
    state = world.together(lambda: _read(folder))
    world.on_main(lambda: _check_identity(folder, state["identity"], current))
    engine.load_trained_state(load_tensors(folder), state["step"])
    stream.load_state({int(lane): lane_state for lane, lane_state in state["lanes"].items()})
    return state["step"]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a `checkpoints` folder, if any."""
    link = folder / "latest"
    if link.is_dir():
        return link.resolve()
    complete = sorted(path.parent for path in folder.glob("step-*/state.json"))
    return complete[-1] if complete else None


def best(folder: Path) -> Path | None:
    """The checkpoint of a `checkpoints` folder with the highest score, of equal ones the later, if any has one."""
    scored = [(score, path) for path in sorted(folder.glob("step-*")) if (score := _score(path)) is not None]
    return max(scored)[1] if scored else None


def best_score(folder: Path) -> float:
    """The best checkpoint's score; minus infinity if none has one."""
    top = best(folder)
    return _score(top) if top else -math.inf


def load_tensors(folder: Path) -> TrainedState:
    """The trained parameters of a checkpoint with their moments, fp32, by the stack's parameter names."""
    values: dict[str, torch.Tensor] = {}
    for name in RUN_FILES:
        if (folder / name).is_file():
            values |= safetensors.torch.load_file(folder / name)
    moments = safetensors.torch.load_file(folder / "optimizer.safetensors")
    names = {name.rpartition("/")[0] for name in moments}
    return {
        name: {"value": values[saved_name(name)]} | {key: moments[f"{name}/{key}"] for key in MOMENTS} for name in names
    }


def identity(config: Config) -> dict[str, Any]:
    """What a run must keep to be continued: the models' and corpora's fingerprints and the keys that shape a step."""
    flat = {key: value for key, value in flatten(config).items() if key.startswith(IDENTITY)}
    models = {f"model.{side}": _fingerprint(getattr(config.model, side)) for side in ("encoder", "decoder")}
    models |= {f"model.{part}": _run_fingerprint(getattr(config.model, part)) for part in ("start", "teacher")}
    corpora = [Manifest.load(path).fingerprint for path in config.data.train]
    return json.loads(json.dumps(flat | models | {"data.train": corpora}))


def teacher_identity(config: Config) -> dict[str, Any]:
    """What the teacher's states depend on besides the text: model, adapters, and how texts become tokens."""
    flat = flatten(config)
    keys = ("model.causal", "model.dtype", "model.base", "data.max_length", "data.truncation")
    tokenizers = [sha256_of(path) for side in ("encoder", "decoder") for path in _tokenizer_files(config, side)]
    models = {
        "model.decoder": _fingerprint(config.model.decoder),
        "model.teacher": _run_fingerprint(config.model.teacher),
    }
    return {key: flat[key] for key in keys} | models | {"tokenizers": " ".join(tokenizers)}


def _tokenizer_files(config: Config, side: str) -> list[Path]:
    folder = resolve(getattr(config.model, side))
    return sorted(path for pattern in ("tokenizer.json", "*.model") for path in folder.glob(pattern))


@functools.cache
def _fingerprint(model: str) -> str:
    """Of the model that the run began with: what a hub id means may change, and must not be fetched in mid-run."""
    return fingerprint(resolve(model))


@functools.cache
def _run_fingerprint(folder: str) -> str:
    """Of another run's checkpoint, by its content; empty for none."""
    files = [Path(folder).expanduser() / name for name in RUN_FILES] if folder else []
    return " ".join(sha256_of(path) for path in files if path.is_file())


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def _write(config: Config, state: TrainedState, lanes: dict[int, Any], step: int, score: float | None) -> Path:
    parent = _folder(config)
    final, partial = parent / f"step-{step:08d}", parent / f".step-{step:08d}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
        files = {name: _write_file(partial / name, content) for name, content in _contents(config, state).items()}
        record = {"step": step, "identity": identity(config), "files": files, "lanes": lanes, "score": score}
        _write_file(partial / "state.json", _encode(record))
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)  # of this very step, left by a run that was rewound
        partial.rename(final)
        _link(parent / "latest", final.name)
        if top := best(parent):
            _link(parent / "best", top.name)
        _sync(parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"cannot save {final}: {error.strerror or error}; earlier checkpoints are intact") from error
    kept = sorted(path for path in parent.glob("step-*") if path <= final)  # later ones: of a run that was rewound
    for old in kept[: -config.checkpoint.keep]:
        if old != top:
            shutil.rmtree(old)
    return final


def _contents(config: Config, state: TrainedState) -> dict[str, bytes]:
    """File name -> bytes. The folder is also a PEFT adapter of the bare LLM; a head that was copied comes along."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in state.items():
        saved = saved_name(name)
        files.setdefault(_file_of(saved), {})[saved] = tensors["value"].contiguous()
    contents = {name: safetensors.torch.save(tensors, {"format": "pt"}) for name, tensors in files.items()}
    moments = {f"{name}/{key}": tensors[key].contiguous() for name, tensors in state.items() for key in MOMENTS}
    contents["optimizer.safetensors"] = safetensors.torch.save(moments)
    if "adapter_model.safetensors" in contents:
        contents["adapter_config.json"] = json.dumps(_peft_config(config), indent=1).encode()
    copied = Path(config.model.teacher).expanduser() / "head.safetensors"
    if config.model.teacher and copied.is_file():
        contents["head.safetensors"] = copied.read_bytes()
    return contents


def _file_of(saved: str) -> str:
    """Where a tensor of this name is kept."""
    if saved.startswith("base_model."):
        return "adapter_model.safetensors"
    return "head.safetensors" if saved.startswith("head.") else "projection.safetensors"


def _peft_config(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": config.model.decoder,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": list(config.lora.targets),
        "bias": "none",
        "inference_mode": True,
    }


def _write_file(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _encode(record: dict[str, Any]) -> bytes:
    """A record as JSON that holds its own hash."""
    sha256 = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"sha256": sha256}, indent=1).encode()


def _decode(content: bytes) -> dict[str, Any]:
    """Raises: ValueError: These are not the bytes that `_encode` returned."""
    record = {key: value for key, value in json.loads(content).items() if key != "sha256"}
    if _encode(record) != content:
        raise ValueError
    return record


def _score(folder: Path) -> float | None:
    """A complete checkpoint's score, if it has one and can be read."""
    try:
        return json.loads((folder / "state.json").read_bytes())["score"]
    except (OSError, ValueError, KeyError):
        return None


def _read(folder: Path) -> dict[str, Any]:
    """A checkpoint's record, once its files have been found to be those that were written."""
    fix = f"remove {folder} to continue from the checkpoint before it"
    try:
        state = _decode((folder / "state.json").read_bytes())
        damaged = [name for name, sha256 in state["files"].items() if sha256_of(folder / name) != sha256]
    except OSError as error:
        raise ValueError(f"{folder} is not a complete checkpoint ({error}); {fix}") from error
    except ValueError:
        damaged = ["state.json"]
    if damaged:
        raise ValueError(f"{folder / damaged[0]} is damaged; {fix}")
    return state


def _check_identity(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    for key, value in current.items():
        if saved.get(key) != value:
            before, now = (_short(item) for item in (saved.get(key), value))
            raise ValueError(f"cannot continue {folder}: {key} was {before} and is {now}; restore it or change run.dir")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
