"""Out of the engine: what was trained as a folder that others open."""

import importlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from mtllm_engine import files
from mtllm_engine.data.vocabulary import read_languages
from mtllm_engine.languages import check_code
from mtllm_engine.model.tensors import resolve
from mtllm_engine.model.weights import ADAPTERS
from mtllm_engine.training.origins import check_origins
from mtllm_engine.training.trained import Trained, checkpoint_in, find_trained, head_of

FORMATS = ("folder", "adapters", "llm", "authors")
DTYPES = ("float32", "bfloat16")
RECORD = "export.json"
"""The sealed record of what is no folder for `find_trained`: its files, by path."""
TASK = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of an export."""

    dtype: str = ""
    """Of the two models' weights; "": as they are stored. What was trained stays fp32."""
    merge: bool = False
    """Whether the adapters go into the LLM's weights."""
    default_language: str = ""
    """Of texts whose language nobody says."""
    tasks: Mapping[str, Path] = field(default_factory=dict)
    """Checkpoints that travel along, each of an LLM fine-tuned for a task."""


def export(
    name: str | Path,
    out: str | Path,
    *,
    format: str = "folder",
    dtype: str = "",
    merge: bool = False,
    push: str = "",
    default_language: str = "",
    tasks: Mapping[str, str | Path] | None = None,
    encoder: str = "",
    decoder: str = "",
    merged: Sequence[str] = (),
) -> Path:
    """Writes what was trained as a folder, whole or not at all.

    Args:
        name, encoder, decoder, merged: As `find_trained`.
        out: A folder that is not there yet.
        format: One of `FORMATS`.
        dtype, merge, default_language, tasks: As `Options`.
        push: The hub's repository that the folder is uploaded to in the end; a new one is private.

    Raises:
        ValueError: What is asked for does not fit what was trained, or there is something at `out`;
            or the disk is full, or the hub refuses.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    trained = find_trained(name, encoder=encoder, decoder=decoder, merged=merged)
    checkpoints = {task: checkpoint_in(Path(each)) for task, each in (tasks or {}).items()}
    options = Options(
        dtype=dtype,
        merge=merge,
        default_language=default_language,
        tasks={**trained.tasks, **checkpoints} if format == "folder" else checkpoints,
    )
    _check(trained, format, options)
    _check_repository(push)
    if not trained.is_exported:
        check_origins(trained.config)
    write = importlib.import_module(f"mtllm_engine.export.{format}").write
    try:
        with files.atomic_folder(out) as draft:
            write(trained, draft, options)
            if format != "folder":  # which has a record of its own
                seal(draft, RECORD, {"format": format})
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}") from error
    if push:
        _push(out, push)
    return out


def seal(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Writes a record of a folder that names all other files in it, with their sizes and hashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(files.sha256_of, paths))
    written = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(paths, hashes)
    }
    with (folder / name).open("wb") as file:
        file.write(files.sealed({**record, "files": written}))
        files.sync(file)


def _check(trained: Trained, format: str, options: Options) -> None:
    """Raises: ValueError: What is asked for is not there, or does not fit what was trained."""
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    if options.dtype and options.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {options.dtype!r}")
    if not trained.reads_stack:
        fix = "export the stack that was trained with it, or add it to one with --task"
        raise ValueError(f"{trained.name} is a fine-tuned LLM without a projection; {fix}")
    if trained.is_merged and (options.merge or format != "folder"):
        gone = "its adapters are in the LLM's weights already"
        raise ValueError(f"{trained.name} is merged: {gone}; export what it was made from")
    for asked, option in (
        (options.merge, "--merge"),
        (options.default_language, "--language"),
        (options.tasks, "--task"),
    ):
        if asked and format != "folder":
            raise ValueError(f"{option} is for --format folder; {format} has no place for it")
    if options.default_language:
        languages = read_languages(resolve(trained.config.model.encoder))
        check_code(options.default_language)
        if languages.is_told and not languages.knows(options.default_language):
            raise ValueError(f"--language: the encoder has no token for {options.default_language}")
    _check_tasks(trained, options.tasks)


def _check_tasks(trained: Trained, tasks: Mapping[str, Path]) -> None:
    for task, folder in tasks.items():
        if trained.head:
            fix = "tasks are added to a stack of stage 1"
            raise ValueError(f"--task {task}: {trained.name} was trained for a task itself; {fix}")
        if not TASK.fullmatch(task):
            raise ValueError(f"a task's name must be letters, digits, - and _, not {task!r}")
        if head_of(folder, "") is None or not (folder / ADAPTERS).is_file():
            fix = "it takes a run of `mtllm finetune`"
            raise ValueError(f"--task {task}: {folder} has no adapters with a head; {fix}")


def _check_repository(name: str) -> None:
    try:
        if name:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: {error}") from None


def _push(folder: Path, repository: str) -> None:
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        again = f"{folder} is complete: `hf upload {repository} {folder}` tries again"
        raise ValueError(f"cannot push to {repository}: {reason}; {again}") from error
