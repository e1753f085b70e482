"""What was trained, found again by any of its names: a run, a checkpoint, a sum of checkpoints, a
recipe's folder, an exported folder or a hub id of one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mtllm_engine import config as configs
from mtllm_engine import files
from mtllm_engine.config import Config, flatten
from mtllm_engine.model import hub, peft
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.tensors import resolve
from mtllm_engine.model.weights import (
    ADAPTERS,
    HEAD_FILE,
    PROJECTION_FILE,
    RUN_FILES,
    checkpoint_tensors,
    has_head,
)
from mtllm_engine.tasks import load_task, task_names
from mtllm_engine.training import checkpoint
from mtllm_engine.training.checkpoint import READS
from mtllm_engine.training.origins import COPY, summed_in

EXPORTED = hub.EXPORTED
"""The sealed record of an exported folder: {"reads": the keys `checkpoint.READS`, "tasks": {name:
head}, "files": {path: {"bytes", "sha256"}}, "about": what a person wants to know}."""
ENCODER, LLM, STUDENT, TEACHER, TASKS = "encoder", "llm", "student", "teacher", "tasks"
"""The folders of an exported folder: two models, and checkpoints beside them."""
OF_MODELS = (".safetensors", ".json", ".toml", ".gguf")  # files that lie in a model's folder
STACKS = ("stage2", "stage2-*", "stage1")  # a recipe's runs that have a projection, best first


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a task asks of a text, and what its answers are called."""

    kind: str
    """ "classification", "choice" or "span"."""
    num_outputs: int
    labels: tuple[str, ...] = ()
    """Of a classification, in the order of the scores."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Something that was trained, and how a text is read with it."""

    name: str
    """As it was asked for."""
    folder: Path
    """The checkpoint, or the exported folder."""
    config: Config
    """To read with: `model.init_from` is the student, one checkpoint, `model.teacher` that of the
    LLM that it learned from, "" if that is the bare one."""
    task: str
    """What the student's head was trained for; "" without one."""
    tasks: Mapping[str, Path]
    """Further tasks that travel along: checkpoints of LLMs fine-tuned for them."""
    record: Mapping[str, Any]
    """A checkpoint's, or an exported folder's; empty where there is none."""

    @property
    def run(self) -> Path | None:
        """The run that a checkpoint is of, if it lies in one."""
        return run_of(self.folder)

    @property
    def is_exported(self) -> bool:
        return (self.folder / EXPORTED).is_file()

    @property
    def is_merged(self) -> bool:
        """Whether the student's adapters are in the LLM's weights: its teacher is gone."""
        return self.is_exported and not (self.student / ADAPTERS).is_file()

    @property
    def without_teacher(self) -> str:
        """Why the LLM that it learned from cannot be read any more; "" where it can."""
        if self.is_merged:
            return "the adapters are merged into the LLM's weights; use a folder that is not merged"
        teacher = self.config.model.teacher
        is_gone = teacher and not Path(teacher).is_dir()
        return f"its teacher, {teacher}, is not there; copy it to that place" if is_gone else ""

    @property
    def student(self) -> Path:
        return Path(self.config.model.init_from[0])

    @property
    def reads_stack(self) -> bool:
        """Whether it has a projection: a fine-tuned LLM reads its own tokens alone."""
        return (self.student / PROJECTION_FILE).is_file()

    @property
    def head(self) -> Head | None:
        return head_of(self.student, self.task)

    @property
    def identity(self) -> str:
        """A digest of all that the vectors of a text depend on, the machine aside."""
        flat = flatten(self.config)
        files_read = [
            (path.name, files.sha256_of(path))
            for folder in (self.student, *map(Path, filter(None, [self.config.model.teacher])))
            for path in sorted(folder.glob("*.safetensors"))
            if path.name in RUN_FILES
        ]
        read = {key: flat[key] for key in READS} | {"quantization": self.config.model.quantization}
        models = self.record.get("files") if self.is_exported else self.record.get("identity")
        llm = " + ".join((self.config.model.decoder, *self.config.model.adapters))
        content = json.dumps([read, files_read, models or llm])
        return hashlib.sha256(content.encode()).hexdigest()


def find_trained(
    name: str | Path, *, encoder: str = "", decoder: str = "", merged: Sequence[str] = ()
) -> Trained:
    """What a run, a checkpoint of one, a sum, a recipe's folder, an exported folder or a hub id of
    one holds; its small files have been found to be those that were written.

    Of a run it is the best checkpoint, or the latest where none was validated; of a recipe stage 2,
    or stage 1 where there is none.

    Args:
        encoder, decoder: The models that it was trained with, where they are not at the place that
            the run's configuration says.
        merged: Likewise the adapters of `model.adapters`.

    Raises:
        ValueError: There is no such thing, or it is damaged or half copied.
    """
    folder = Path(files.expand(str(name)))
    if folder.is_file() and folder.suffix not in OF_MODELS:
        raise ValueError(f"{name} is a file, and no run, checkpoint or export; name one's folder")
    folder = folder if folder.is_dir() else resolve(str(name))
    if (folder / EXPORTED).is_file():
        return _exported(str(name), folder)
    moved = {"encoder": encoder, "decoder": decoder, "adapters": tuple(merged)}
    return _of_checkpoint(str(name), checkpoint_in(folder), moved)


def head_of(folder: Path, task: str, labels: Sequence[str] = ()) -> Head | None:
    """The head that lies in a checkpoint, if there is one.

    Args:
        task: The family that it was trained for, or any other name: then it is a classification's.
        labels: Of the classes, where no family names them; by default their numbers.

    Raises:
        ValueError: There are other labels than outputs.
    """
    tensors = checkpoint_tensors(folder)
    if not has_head(tensors):
        return None
    outputs, _ = tensors.shape("head.weight")
    if task in task_names():
        family = load_task(task)
        kind, count = family.head_size
        if outputs != (1 if kind == "choice" else count):
            has = f"{folder / HEAD_FILE} has {outputs} outputs"
            raise ValueError(f"{has}, and task {task} asks for {count}; name its own task")
        names = family.labels
    else:
        kind, count, names = "classification", outputs, tuple(map(str, range(outputs)))
    if isinstance(labels, str) or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be a list of different names, not {labels!r}")
    if labels and len(labels) != len(names):
        wrong = f"has {len(names)} classes, and there are {len(labels)} labels"
        raise ValueError(f"{folder / HEAD_FILE} {wrong}; name each class, or none")
    return Head(kind=kind, num_outputs=count, labels=tuple(labels) or names)


def task_of(folder: Path) -> str:
    """The family that a checkpoint's run learned; "" where nothing says."""
    run = run_of(folder)
    return configs.load(run / "config.toml").task.name if run else ""


def run_of(folder: Path) -> Path | None:
    """The run that a checkpoint lies in."""
    run = folder.resolve().parent.parent
    return run if (run / "config.toml").is_file() else None


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder is, or the best or else the latest of the run that it is; of a
    recipe's folder that of stage 2, or of stage 1 where there is none.

    Raises:
        ValueError: There is none.
    """
    if any((folder / name).is_file() for name in RUN_FILES):
        return folder
    if not (folder / "checkpoints").is_dir():
        folder = _stack_in(folder)
    saved = folder / "checkpoints"
    chosen = checkpoint.best(saved) or checkpoint.latest(saved)
    if chosen is None:
        raise ValueError(f"{folder} has no complete checkpoint yet")
    return chosen


def _stack_in(recipe: Path) -> Path:
    """The run of a recipe's folder that is its stack.

    Raises:
        ValueError: There is none, or there are several, one for each seed.
    """
    for names in STACKS:
        runs = sorted(path.parent for path in recipe.glob(f"{names}/checkpoints"))
        if len(runs) > 1:
            stacks = ", ".join(map(str, runs))
            raise ValueError(f"{recipe} has several stacks; name one of {stacks}")
        if runs:
            return runs[0]
    if (recipe / "manifest.json").is_file():
        raise ValueError(f"{recipe} is a corpus and no model; see `mtllm shards show {recipe}`")
    lack = "neither a run, a checkpoint nor an exported folder"
    raise ValueError(f"{recipe} is {lack}: it has no {EXPORTED}, {ADAPTERS} or checkpoints")


def _of_checkpoint(name: str, folder: Path, moved: Mapping[str, Any]) -> Trained:
    """Args: moved: the keys of [model] that say another place than the run does."""
    record: Mapping[str, Any] = {}
    if (folder / "state.json").exists():
        record = checkpoint.read_record(folder, COPY, names=(*RUN_FILES, peft.FILE))
    parts = summed_in(folder)
    trained = next((run for part in (folder, *parts) if (run := _stack_run(part))), None)
    trained = trained or run_of(folder)
    if trained is None and not (moved["encoder"] and moved["decoder"]):
        lack = "there is no config.toml of its run beside it"
        fix = "copy the run's folder as it is, or say encoder= and decoder="
        raise ValueError(f"{folder}: {lack}, so what it was trained with is not known; {fix}")
    if trained:
        config = checkpoint.follow(configs.load(trained / "config.toml"))
    else:  # others' folders say nothing of how texts are read
        config = _saying(record.get("identity", {}))
        chain = peft.read_chain(folder) if (folder / peft.FILE).is_file() else ()
        config = replace(config, model=replace(config.model, adapters=chain))
        if record.get("identity", {}).get("model.teacher"):  # which is somewhere else
            config = replace(config, model=replace(config.model, teacher=str(folder / TEACHER)))
    has_task = (folder / HEAD_FILE).is_file()
    if parts:  # its teacher is the part that learned the task
        learned = [str(part) for part in parts if (part / HEAD_FILE).is_file()]
        teacher = record.get("teacher", next(iter(learned), ""))
    else:
        teacher = config.model.teacher
    task = record.get("identity", {}).get("task.name", config.task.name)
    model = replace(
        config.model,
        **{key: place for key, place in moved.items() if place},
        init_from=(str(folder),),
        teacher=teacher,
    )
    config = replace(config, model=model)
    return Trained(
        name=name,
        folder=folder,
        config=_reading(config, folder),
        task=task if has_task else "",
        tasks={},
        record=record,
    )


def _stack_run(folder: Path) -> Path | None:
    """The run of a checkpoint that has a projection."""
    return run_of(folder) if (folder / PROJECTION_FILE).is_file() else None


def _exported(name: str, folder: Path) -> Trained:
    path = folder / EXPORTED
    try:
        record = files.unsealed(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is damaged; copy or download the folder again") from None
    # The card may be rewritten, and a download has only what is read here.
    read = {name: about for name, about in record["files"].items() if _is_read(name)}
    check_files(folder, read)
    config = _saying(record["reads"])
    teacher = folder / TEACHER
    model = replace(
        config.model,
        encoder=str(folder / ENCODER),
        decoder=str(folder / LLM),
        init_from=(str(folder / STUDENT),),
        teacher=str(teacher) if teacher.is_dir() else "",
    )
    own = record.get("task", "")
    tasks = {task: folder / TASKS / task for task in record["tasks"] if task != own}
    return Trained(
        name=name,
        folder=folder,
        config=_reading(replace(config, model=model), folder / STUDENT),
        task=own,
        tasks=tasks,
        record=record,
    )


def _is_read(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in hub.FILES)


def check_files(folder: Path, written: Mapping[str, Mapping[str, Any]]) -> None:
    """Looks whether a folder is what was written: all files there and as long, and the small ones
    the same to the last bit.

    Raises:
        ValueError: One is not.
    """
    fix = "copy or download the folder again"
    for name, about in written.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is not complete: {name} is missing; {fix}")
        if path.stat().st_size != about["bytes"]:
            size = f"{path.stat().st_size} bytes instead of {about['bytes']}"
            raise ValueError(f"{path} has {size}; {fix}")
        if about["bytes"] <= SMALL and files.sha256_of(path) != about["sha256"]:
            raise ValueError(f"{path} is damaged; {fix}")


SMALL = 1 << 28
"""Bytes of a file that is read whole to see that it is sound: all but the models themselves."""


def _saying(reads: Mapping[str, Any]) -> Config:
    """Of what has no configuration: each key's default, but for those of `READS` that are here."""
    tree = {
        "run": {"dir": "-"},
        "model": {"encoder": "-", "decoder": "-"},
        "data": {"train": ["-"], "pack_documents": 1},
        "optim": {"steps": 1},
    }
    config = configs.from_dict(tree)
    for key in (each for each in READS if each in reads):
        section, _, field = key.partition(".")
        part = replace(getattr(config, section), **{field: reads[key]})
        config = replace(config, **{section: part})
    return config


def _reading(config: Config, student: Path) -> Config:
    """The configuration of what only reads."""
    # Of a checkpoint that no configuration came with its file says it.
    bias = "bias" in checkpoint_tensors(student).names
    is_merged = not (student / ADAPTERS).is_file() and (student / PROJECTION_FILE).is_file()
    return replace(
        config,
        model=replace(config.model, projection_bias=bias),
        objective=replace(config.objective, kind="finetune", reader="stack", token_weight=0.0),
        lora=replace(config.lora, target_modules=()) if is_merged else read_lora(student),
        data=replace(config.data, teacher_states="", on_error="raise"),
        zero=replace(config.zero, stage=0),
    )
