"""What a run stands on: other runs' checkpoints, each found whole and of the models that it meets,
and several of them added up.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mtllm_engine import files
from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.model import peft
from mtllm_engine.model.licences import public_name
from mtllm_engine.model.merge import find_adapters
from mtllm_engine.model.sums import AdapterSum, lora_of, sum_of
from mtllm_engine.model.weights import (
    HEAD_FILE,
    PROJECTION_FILE,
    RUN_FILES,
    checkpoint_tensors,
    file_of,
)
from mtllm_engine.training.checkpoint import (
    EARLIER,
    FORMAT,
    READS,
    chain_of,
    fingerprint_of,
    read_record,
    record_of,
    write_file,
)

COPY = "copy it again, or name another checkpoint"


def check_origins(config: Config) -> None:
    """Looks at what a run stands on, `model.adapters`, `model.init_from` and `model.teacher`,
    before it is read: that nothing of it is damaged, and that it was trained with the models and
    the attention that it meets here, of a chain each with the ones before it. Folders of others,
    such as PEFT's, say nothing of either, and are taken as they are.

    Raises:
        ValueError: One is damaged, or was trained with others.
    """
    starts = [(folder, config.objective.reader == "stack") for folder in config.model.init_from]
    teachers = [(folder, False) for folder in (config.model.teacher,) if folder]
    model = config.model
    _check_chain(config)
    for folder, reads_stack in (*starts, *teachers):
        if not (Path(folder) / "state.json").exists():
            continue
        current = {"model.causal": model.causal, "model.decoder": fingerprint_of(model.decoder)}
        current["model.adapters"] = chain_of(model.adapters)
        # A projection is of one encoder; who reads the LLM's own tokens has none.
        if reads_stack and (Path(folder) / PROJECTION_FILE).is_file():
            current["model.encoder"] = fingerprint_of(model.encoder)
            current["model.encoder_prefix"] = model.encoder_prefix
        keys = ("causal", "decoder", "encoder")
        names = {f"model.{key}": getattr(model, key) for key in keys}
        names["model.encoder_prefix"] = repr(model.encoder_prefix)
        names["model.adapters"] = list(model.adapters)
        check_origin(Path(folder), current, names)


def _check_chain(config: Config) -> None:
    """Raises: ValueError: One of `model.adapters` is a checkpoint that is damaged, or that was
    trained with another LLM, attention, or chain than the one before it.
    """
    model = config.model
    for number, name in enumerate(model.adapters):
        folder, before = find_adapters(name), model.adapters[:number]
        if not (folder / "state.json").exists():
            continue
        current = {"model.causal": model.causal, "model.decoder": fingerprint_of(model.decoder)}
        current["model.adapters"] = chain_of(before)
        names = {"model.causal": model.causal, "model.decoder": model.decoder}
        names["model.adapters"] = f"the {list(before)} before it"
        check_origin(folder, current, names)


def described(folder: Path, decoder: str) -> str:
    """What a header says behind the name of adapters: what of them is left out, and the LLM that
    they were made on where that is called otherwise; "" for nothing.
    """
    if not (folder / peft.FILE).is_file():
        return ""
    base, parts = peft.read_base(folder), []
    if base and _last_name(base) != _last_name(decoder):
        parts.append(f"made on {base}")
    if heads := peft.read_heads(folder):
        parts.append(f"without the head {', '.join(heads)}, which is no part of the LLM")
    return f" ({'; '.join(parts)})" if parts else ""


def _last_name(model: str) -> str:
    """What a hub id and a folder of it have in common."""
    return public_name(model).rpartition("/")[2].lower()


def check_origin(folder: Path, current: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Looks whether a run's checkpoint is sound and was trained with what it meets.

    Args:
        current, names: What it meets, by the keys of a checkpoint's identity, and what that is
            called.

    Raises:
        ValueError: It is damaged, or was trained with something else.
    """
    saved = _models_of(read_record(folder, COPY, names=(*RUN_FILES, peft.FILE)))
    for key, value in current.items():
        if saved.get(key, value) != value:  # a sum may not know it of its parts
            change = f"another {key} than {names[key]}; set it to that one"
            raise ValueError(f"{folder} was trained with {change}")


def _models_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a record. Who names an LLM and no chain was trained before there were any,
    and who names an encoder and no prefix likewise."""
    said = record["identity"]
    names = {"model.decoder": "model.adapters", "model.encoder": "model.encoder_prefix"}
    return {key: EARLIER[key] for model, key in names.items() if model in said} | said


def add_up(folders: Sequence[str], out: Path) -> LoraConfig:
    """Writes the sum of several checkpoints as one: PEFT's adapters of the summed rank, and the
    projection and the head of those that have them.

    Returns:
        The sum's adapters.

    Raises:
        ValueError: There is something at `out`, or a checkpoint is damaged, does not fit another,
            or was trained with another LLM or attention.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    if len(folders) < 2:
        raise ValueError("a sum is of at least two checkpoints")
    parts = [Path(folder) for folder in folders]
    lora = sum_of([lora_of(part) for part in parts])
    tensors = AdapterSum(list(map(checkpoint_tensors, parts)), scale=lora.scale, seed=0)
    record = _origins(parts)
    contents: dict[str, dict[str, torch.Tensor]] = {}
    for name in tensors.names:
        shape = tensors.shape(name)
        value = tensors.read(name, 0, math.prod(shape)).view(shape)
        contents.setdefault(file_of(name), {})[name] = value
    with files.atomic_folder(out) as draft:
        saved = {name: safetensors.torch.save(each, FORMAT) for name, each in contents.items()}
        causal = record["identity"].get("model.causal") is not False
        about = {"causal": causal, "chain": peft.read_chain(parts[0])}
        config = peft.peft_config(lora, peft.read_base(parts[0]), **about)
        saved[peft.FILE] = json.dumps(config, indent=1).encode()
        hashes = {name: write_file(draft / name, content) for name, content in saved.items()}
        write_file(draft / "state.json", files.sealed(record | {"files": hashes}))
    return lora


def _origins(parts: Sequence[Path]) -> dict[str, Any]:
    """What a sum's record says of its parts: the models that they were trained with, by those that
    say so.

    Raises:
        ValueError: One is damaged, or two were trained with different models.
    """
    identity: dict[str, Any] = {}
    said_by: dict[str, Path] = {}
    for part in parts:
        if not (part / "state.json").exists():
            continue
        state = read_record(part, COPY, names=(*RUN_FILES, peft.FILE))
        said = _models_of(state)
        # What they must have in common, and what one of them alone says.
        keys = ["model.causal", "model.decoder", "model.adapters"]
        has_projection, has_head = (name in state["files"] for name in RUN_FILES[1:])
        alone = ["model.encoder", *READS[1:]] if has_projection else []
        alone += ["task.name"] if has_head else []
        for key in (*keys, *alone):
            if key not in said:
                continue
            value = said[key]
            if identity.setdefault(key, value) != value:
                raise ValueError(f"{said_by[key]} and {part} were trained with another {key} each")
            said_by.setdefault(key, part)
    learned = [str(part.resolve()) for part in parts if (part / HEAD_FILE).is_file()]
    summed = [str(part.resolve()) for part in parts]
    return {"identity": identity, "sum_of": summed, "teacher": next(iter(learned), "")}


def summed_in(folder: Path) -> list[Path]:
    """The checkpoints whose adapters `add_up` added up in a folder; none in others."""
    return list(map(Path, (record_of(folder) or {}).get("sum_of", [])))
