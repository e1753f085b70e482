"""The whole method from one file: stage 1, the task in English, stage 2, evaluation.

A recipe is a training configuration shared by all steps, and what each step has of its own in
tables named after it:

    [recipe]            dir, gpus, seeds
    [model] [lora] ...  as in any configuration; [task] and [evaluate] too
    [stage1.data] [stage1.optim] [finetune.optim] [stage2.optim] ...

Stage 1 runs once; fine-tuning, stage 2 and evaluation run for each seed. A step that is done is not
run again. The stack's first step starts from an `init_from` in [model]: stage 1, or without it (its
optim.steps = 0) stage 2. A step that sets steps or epochs of its own means neither of the shared
ones.

`stage2.from` says what stage 2 starts from: the "sum" of stage 1's adapters and the fine-tuned
LLM's, whose rank is that of both, or "stage1" alone. The sum itself, which is not trained, is
evaluated beside the stack.
"""

import functools
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mtllm_engine import config as configs
from mtllm_engine.config import FOLLOWING, Config, EvaluateConfig, dumps, from_dict
from mtllm_engine.evaluation import predictions
from mtllm_engine.evaluation.systems import find_tests
from mtllm_engine.files import expand
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.weights import checkpoint_tensors
from mtllm_engine.tasks import digest_now, digest_packed, load_task
from mtllm_engine.train import changes, check_files
from mtllm_engine.training import checkpoint
from mtllm_engine.training.launch import launcher

T = TypeVar("T")
TABLES = ("stage1", "finetune", "stage2")
STARTS = ("sum", "stage1")  # of stage 2; the first is the default
CORPORA = ("train", "mixture")  # of [data]: evaluation has none
LENGTHS = {"steps", "epochs"}  # of [optim]: one of them is above 0
SYSTEMS = EvaluateConfig().systems
KEYS = {"dir": str, "gpus": int, "seeds": list}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch of one module: its name is its folder's, and its configuration's beside it."""

    name: str
    module: str
    config: Config


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe's jobs, in the order in which they run."""

    folder: Path
    gpus: int
    jobs: tuple[Job, ...]

    @property
    def results(self) -> Path:
        return self.folder / "results"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and every configuration in it, before anything runs.

    Raises:
        ValueError: A key or value of some step is not valid; the message names step and key.
    """
    tree = configs.read(path, overrides)
    own = _own_keys(tree.pop("recipe", {}), path)
    steps = {name: tree.pop(name, {}) for name in TABLES}
    origin = _origin(steps["stage2"])
    _check_sections(tree, "")
    for name, sections in steps.items():
        _check_sections({name: sections}, "")
        _check_sections(sections, f"{name}.")
    folder = Path(expand(own["dir"]))
    jobs = [_job(*each) for each in _trees(tree, steps, folder, own["seeds"], origin)]
    return Recipe(folder=folder, gpus=own["gpus"], jobs=tuple(jobs))


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A recipe with whatever is wrong in it."""

    folder: Path
    gpus: int
    jobs: tuple[tuple[str, str, configs.Examined], ...]
    """Name, module and configuration of each."""
    problems: tuple[str, ...]
    """Of the recipe itself, no step's."""

    def recipe(self) -> Recipe:
        """What it is once nothing is wrong in it."""
        jobs = [
            Job(name=name, module=f"mtllm_engine.{module}", config=examined.config)
            for name, module, examined in self.jobs
        ]
        return Recipe(folder=self.folder, gpus=self.gpus, jobs=tuple(jobs))


def examine(tree: dict[str, Any], path: str | Path) -> Draft:
    """A recipe of a file's tables, as far as it can be read.

    Args:
        path: Of the file, for messages.
    """
    problems: list[str] = []
    own = _readable_own(tree.pop("recipe", {}), path, problems)
    steps = {name: tree.pop(name, {}) for name in TABLES}
    origin = _ask(lambda: _origin(steps["stage2"]), problems) or ""
    shared, doubtful = _tables(tree, "", problems)
    tables, unreadable = _tables(steps, "", problems)
    steps = {}
    for name in TABLES:
        steps[name], others = _tables(tables.get(name, {}), f"{name}.", problems)
        doubtful |= others
    for prefix, sections in (("", shared), ("stage2.", steps["stage2"])):
        start = sections.get("model", {}).get("init_from", [])
        if not isinstance(start, str | list):
            problems.append(f"{prefix}model.init_from must be a list, not {start!r}")
            del sections["model"]["init_from"]
            doubtful.add("model.init_from")
    folder = Path(expand(own["dir"]))
    options = (shared, steps, folder, own["seeds"])
    trees = _ask(lambda: [*_trees(*options, origin)], problems) or [*_trees(*options, "")]
    jobs = tuple(
        (name, module, configs.examine(each, doubtful | _unsaid(module, each)))
        for name, module, each in trees
        if name.partition("-")[0] not in unreadable
    )
    return Draft(folder=folder, gpus=own["gpus"], jobs=jobs, problems=tuple(problems))


def _readable_own(given: Any, path: str | Path, problems: list[str]) -> dict[str, Any]:
    """[recipe], with a default in the place of each value that is at fault."""
    own: dict[str, Any] = {"dir": "-", "gpus": 1, "seeds": [0]}
    if not isinstance(given, Mapping) or "dir" not in given:
        _ask(lambda: _own_keys({} if isinstance(given, Mapping) else given, path), problems)
    for key, value in given.items() if isinstance(given, Mapping) else ():
        alone = {"dir": "-", key: value}
        own |= _ask(lambda alone=alone: _own_keys(alone, path) and alone, problems) or {}
    return own | ({"dir": given["dir"]} if _has_dir(given) else {})


def _has_dir(given: Any) -> bool:
    return isinstance(given, Mapping) and isinstance(given.get("dir"), str) and given["dir"] != ""


def _unsaid(module: str, tree: Mapping[str, Any]) -> set[str]:
    """What evaluation is not told, and that has a line elsewhere: of [data], stage 2 misses it."""
    said = {"data": tree.get("data"), "task.test": tree.get("task", {}).get("test")}
    return {key for key, value in said.items() if not value and module == "evaluate"}


def _tables(
    sections: Mapping[str, Any], prefix: str, problems: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """The sections that are tables, and the names of the others."""
    for name, section in sections.items():
        _ask(lambda each=({name: section}): _check_sections(each, prefix), problems)
    tables = {name: dict(each) for name, each in sections.items() if isinstance(each, Mapping)}
    return tables, sections.keys() - tables.keys()


def _ask(question: Callable[[], T], problems: list[str]) -> T | None:
    """The answer; None where it is a problem, which is kept."""
    try:
        return question()
    except ValueError as error:
        problems.append(str(error))
        return None


def run(recipe: Recipe) -> int:
    """Runs what is not done yet; the exit status of the first job that fails or was stopped: the
    rest is left then.

    Raises:
        ValueError: As `check`.
    """
    pending = check(recipe)
    for line in dict.fromkeys(_changes(recipe, pending)):
        print(f"mtllm: warning: {line}", file=sys.stderr)
    for job in recipe.jobs:  # what was killed in its last save, or copied, is read by the next
        if job not in pending:
            checkpoint.repair(Path(job.config.run.dir) / "checkpoints")
    if not pending:
        print(f"all steps are done: {recipe.results / 'results.md'}")
    for number, job in enumerate(pending, start=1):
        print(f"\n[{number}/{len(pending)}] {job.name}", flush=True)
        path = _file(recipe, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(job.config), encoding="utf-8")
        if status := _launch([*launcher(job.module, recipe.gpus), str(path)]):
            fix = "run the same command again to go on from there"
            print(f"mtllm: error: {job.name} failed; {fix}", file=sys.stderr)
            return status
        if stopped := _stopped_after(job):
            fix = "run the same command again to go on"
            print(f"mtllm: error: {job.name} was stopped {stopped}; {fix}", file=sys.stderr)
            return 1
        mark_done(recipe, job)
    return 0


def check(recipe: Recipe) -> list[Job]:
    """The jobs that are not done yet, once all that they read and that no job makes has been found
    to be there.

    Raises:
        ValueError: A job that is done had another configuration, or reached its end with one; a
            task, its files, a corpus, a checkpoint or a model of another is missing or unfit.
    """
    pending = [job for job in recipe.jobs if not is_done(recipe, job)]
    for job in pending:
        data = job.config.data
        try:
            _check_finished(recipe, job)
            other = checkpoint.follow(job.config)
            origins = (*other.model.init_from, *other.evaluate.stage1, other.model.teacher)
            for path in _given(recipe, *origins):
                checkpoint_tensors(path)
            if job.module.endswith("evaluate"):
                find_tests(job.config)
            else:
                given = replace(data, train=_given(recipe, *data.train))
                check_files(replace(job.config, data=given))
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error
    return pending


def _changes(recipe: Recipe, pending: Sequence[Job]) -> Iterator[str]:
    """A line for each job that is done and whose task's files say something else since."""
    now = functools.cache(lambda name, *of_split: digest_now(load_task(name), *of_split))
    for job in (job for job in recipe.jobs if job not in pending):
        for split, source, language, before in _read_by(job, recipe.results):
            if now(job.config.task.name, source, split, language) not in (before, None):
                what = f"task.{split} ({source}) has changed in {language} since"
                fix = f"remove {_marker(recipe, job)} and its folder to make it anew"
                yield f"{job.name} is done, but {what}; {fix}"


def _read_by(job: Job, results: Path) -> Iterator[tuple[str, str, str, str]]:
    """(split, test set or source, language, digest) of what a job that is done has read."""
    task, corpora = job.config.task, Path(job.config.run.dir) / "corpus"
    for split in ("train", "validation"):
        if (source := getattr(task, split)) and (digest := digest_packed(corpora / split)):
            yield split, source, ENGLISH, digest
    tests = {source.partition(":")[0]: source for source in task.test}
    is_there = tests and any(results.rglob("predictions-*.jsonl"))
    for item in predictions.load(results, damaged=[]) if is_there else ():
        if item.maker and item.dataset in tests and item.seed == job.config.run.seed:
            yield "test", tests[item.dataset], item.language, item.maker["test"]


def is_done(recipe: Recipe, job: Job) -> bool:
    """Raises: ValueError: It was done with another configuration."""
    marker = _marker(recipe, job)
    if not marker.is_file():
        return False
    if marker.read_text().strip() != _digest(job):
        fix = f"remove {marker} and its folder, or set recipe.dir"
        raise ValueError(f"{job.name} was made with other settings; {fix}")
    return True


def mark_done(recipe: Recipe, job: Job) -> None:
    """Notes that a job is done, by its configuration."""
    _marker(recipe, job).write_text(_digest(job) + "\n")


def _launch(command: Sequence[str]) -> int:
    """The exit status; Ctrl-C is for the ranks, which save first, and is waited for, also by the
    launcher.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _given(recipe: Recipe, *paths: str) -> tuple[str, ...]:
    """Of paths, "" aside, those that no job makes: all but what lies in the recipe's folder."""
    return tuple(path for path in paths if path and not Path(path).is_relative_to(recipe.folder))


def _check_sections(tree: Mapping[str, Any], prefix: str) -> None:
    for name, section in tree.items():
        if not isinstance(section, Mapping):
            raise ValueError(f"{prefix}{name} must be a section, not {section!r}")


def _own_keys(given: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    _check_sections({"recipe": given}, "")
    own = {"gpus": 1, "seeds": [0], **given}
    for key, value in own.items():
        if key not in KEYS:
            raise ValueError(f"unknown key: recipe.{key}; there are {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise ValueError(f"recipe.{key} must be of type {KEYS[key].__name__}, not {value!r}")
    if "dir" not in own:
        raise ValueError(f"missing key: recipe.dir in {path}")
    if not own["dir"]:
        raise ValueError("recipe.dir is empty")
    if own["gpus"] < 1:
        raise ValueError("recipe.gpus must be at least 1")
    if not own["seeds"] or any(type(seed) is not int for seed in own["seeds"]):
        raise ValueError("recipe.seeds must be a list of whole numbers, of one or more")
    if len(set(own["seeds"])) < len(own["seeds"]):
        raise ValueError(f"recipe.seeds={own['seeds']} has one of them twice; each seed runs once")
    return own


def _origin(stage2: Any) -> str:
    """What stage 2 starts from, removed from its table; "" if it does not say."""
    origin = stage2.pop("from", "") if isinstance(stage2, dict) else ""
    if origin not in ("", *STARTS):
        raise ValueError(f"stage2.from must be one of {', '.join(STARTS)}, not {origin!r}")
    return origin


def _trees(
    shared: Mapping[str, Any],
    steps: Mapping[str, Any],
    folder: Path,
    seeds: Sequence[int],
    origin: str,
) -> Iterator[tuple[str, str, dict]]:
    """(name, module, configuration as a tree) of each job. Args: origin: one of STARTS, or ""."""
    start = shared.get("model", {}).get("init_from", [])
    task = shared.get("task", {})
    untasked = {name: table for name, table in shared.items() if name not in ("task", "evaluate")}
    # Stage 1, which knows no task: once, and what every seed's stage 2 then starts from.
    if _has_stage1(untasked.get("optim", {}), steps["stage1"].get("optim", {})):
        own = {"run": {"dir": str(folder / "stage1")}}
        yield "stage1", "train", _merged(untasked, steps["stage1"], own)
        start = [str(folder / "stage1" / "checkpoints" / "latest")]
    start = steps["stage2"].get("model", {}).get("init_from", start)
    start = [start] if isinstance(start, str) and start else start or []
    if origin and not start:
        fix = "train it, or set model.init_from"
        raise ValueError(f"stage2.from = {origin!r}, and there is no stage 1: {fix}")
    is_sum = bool(start) and (origin or STARTS[0]) == "sum"
    english = {key: value for key, value in task.items() if key != "test"}
    tested = {key: value for key, value in task.items() if key in ("name", "test")}
    pick = "best" if task.get("validation") else "latest"
    for seed in seeds:
        names = {step: f"{step}-{seed}" for step in ("finetune", "stage2", "evaluate")}
        dirs = {step: str(folder / name) for step, name in names.items()}
        own = {step: {"run": {"dir": dirs[step], "seed": seed}} for step in names}
        best = {step: str(folder / name / "checkpoints" / pick) for step, name in names.items()}
        # The LLM learns the task; a stack's adapters, where stage 1 starts from some, are not its.
        fixed = {"objective": {"kind": "finetune", "reader": "llm"}, "task": english}
        fixed |= {"model": {"init_from": []}}
        finetune = _merged(untasked, fixed, steps["finetune"], own["finetune"])
        yield names["finetune"], "finetune", finetune
        # The stack learns from it. Stored states get a name of their own for each seed and teacher:
        # the corpora that they lie beside may be other recipes' too.
        begun = {"model": {"init_from": [*start, best["finetune"]] if is_sum else start}}
        fixed = {"model": {"teacher": best["finetune"]}, "task": english}
        fixed |= {"lora": FOLLOWING} if is_sum else {}
        stage2 = _merged(untasked, fixed, steps["stage2"], own["stage2"], begun)
        states = stage2.get("data", {}).get("teacher_states")
        if isinstance(states, str) and states:
            digest = _teacher_digest(finetune, stage2, steps["stage2"])
            stage2["data"]["teacher_states"] = f"{states}-{seed}-{digest}"
            yield f"targets-{seed}", "targets", stage2
        yield names["stage2"], "train", stage2
        # Both, and the LLM after translation, read every test set as stage 2 reads its texts.
        evaluated = {"systems": [*SYSTEMS, "sum"] if start else SYSTEMS, "stage1": start}
        evaluated |= shared.get("evaluate", {})
        # The encoder alone learns the English examples there.
        learned = english if "encoder" in evaluated["systems"] else {}
        own_data = steps["stage2"].get("data", {})
        as_read = {key: value for key, value in own_data.items() if key not in CORPORA}
        read = {"data": as_read, "evaluate": evaluated}
        fixed = {"model": {"init_from": best["stage2"], "teacher": best["finetune"]}}
        fixed |= {"task": learned | tested, "evaluate": {"results": str(folder / "results")}}
        yield names["evaluate"], "evaluate", _merged(untasked, read, fixed, own["evaluate"])


def _teacher_digest(
    finetune: Mapping[str, Any], stage2: Mapping[str, Any], own: Mapping[str, Any]
) -> str:
    """Eight letters that tell teachers apart: how the LLM learns the task, wherever, and how stage
    2 has it read."""
    run = {key: value for key, value in finetune["run"].items() if key != "dir"}
    lengths = [stage2["data"].get(key) for key in ("max_length", "truncation", "parts")]
    teacher = [finetune | {"run": run}, own.get("model", {}), lengths]
    content = json.dumps(teacher, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _has_stage1(shared: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    lengths = own if LENGTHS & own.keys() else shared
    return str(lengths.get("steps", 1)) != "0" or (lengths is shared and bool(shared.get("epochs")))


def _job(name: str, module: str, tree: dict) -> Job:
    try:
        return Job(name=name, module=f"mtllm_engine.{module}", config=from_dict(tree))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Sections joined, later trees over earlier ones; optim.steps and optim.epochs replace one
    another.
    """
    merged: dict[str, Any] = {}
    for tree in trees:
        for section, table in tree.items():
            replaced = LENGTHS if section == "optim" and LENGTHS & table.keys() else set()
            before = merged.get(section, {}).items()
            merged[section] = {key: value for key, value in before if key not in replaced} | table
    return merged


def _check_finished(recipe: Recipe, job: Job) -> None:
    """Raises: ValueError: A training that is not marked as done has reached its last step, with
    other settings than those that it would be done with now."""
    path, run = _file(recipe, job), Path(job.config.run.dir)
    if job.module.endswith(("targets", "evaluate")) or not path.is_file():
        return
    last = checkpoint.latest(run / "checkpoints")
    if last is None or _stopped_after(job):
        return
    before, now = configs.load(path), job.config
    is_longer = now.optim.steps > checkpoint.step_of(last) or now.optim.epochs > before.optim.epochs
    if not is_longer and (changed := changes(before, now)):
        fix = f"remove {run} to train again, or set recipe.dir"
        raise ValueError(f"it was made with other settings ({'; '.join(changed)}); {fix}")


def _file(recipe: Recipe, job: Job) -> Path:
    return recipe.folder / f"{job.name}.toml"


def _marker(recipe: Recipe, job: Job) -> Path:
    return recipe.folder / f"{job.name}.done"


def _digest(job: Job) -> str:
    return hashlib.sha256(dumps(job.config).encode()).hexdigest()


def _stopped_after(job: Job) -> str:
    """How far a training got that was asked to stop, which ends it in order too; "" if it reached
    its last step.
    """
    run = Path(job.config.run.dir)
    latest = checkpoint.latest(run / "checkpoints")
    if latest is None:
        return ""
    done = checkpoint.step_of(latest)
    steps = configs.load(run / "config.toml").optim.steps
    return f"after step {done} of {steps}" if done < steps else ""
