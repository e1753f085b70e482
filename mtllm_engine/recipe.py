"""The whole method from one file: stage 1, the task in English, stage 2, evaluation; once or over settings.

A recipe is a training configuration shared by all steps, and what each step has of its own in tables named after it:

    [recipe]            dir, gpus, seeds
    [model] [lora] ...  as in any configuration; [task] and [evaluate] too
    [stage1.data] [stage1.optim] [finetune.optim] [distil.optim] ...

Stage 1 runs once; fine-tuning, distillation and evaluation run for each seed. A step that is done is not run again. The
stack's first step starts from a `start` in [model]: stage 1, or without it (its optim.steps = 0) distillation. A step
that sets steps or epochs of its own means neither of the shared ones.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtllm_engine import checkpoint, results
from mtllm_engine import config as configs
from mtllm_engine.config import Config, OptimConfig, dumps, from_dict
from mtllm_engine.evaluate import find_tests
from mtllm_engine.model.pretrained import run_checkpoint
from mtllm_engine.tables import AVERAGE, plot_compute
from mtllm_engine.train import check_files
from mtllm_engine.world import launcher

TABLES = ("stage1", "finetune", "distil")
LENGTHS = {"steps", "epochs"}  # of [optim]: one of them is above 0
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
    _check_sections(tree, "")
    for name, sections in steps.items():
        _check_sections({name: sections}, "")
        _check_sections(sections, f"{name}.")
    folder = Path(own["dir"])
    jobs = [_job(*made) for made in _trees(tree, steps, folder, own["seeds"])]
    return Recipe(folder=folder, gpus=own["gpus"], jobs=tuple(jobs))


def run(recipe: Recipe) -> int:
    """Runs what is not done yet; the exit status of the first job that fails or was stopped: the rest is left then.

    Raises:
        ValueError: As `check`.
    """
    pending = check(recipe)
    if not pending:
        print(f"all steps are done: {recipe.results / 'results.md'}")
    for number, job in enumerate(pending, start=1):
        print(f"\n[{number}/{len(pending)}] {job.name}", flush=True)
        path = recipe.folder / f"{job.name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(job.config), encoding="utf-8")
        if status := _launch([*launcher(job.module, recipe.gpus), str(path)]):
            print(f"mtllm: error: {job.name} failed; run the same command again to go on from there", file=sys.stderr)
            return status
        if stopped := _stopped_after(job):
            print(
                f"mtllm: error: {job.name} was stopped {stopped}; run the same command again to go on", file=sys.stderr
            )
            return 1
        _mark_done(recipe, job)
    return 0


def check(recipe: Recipe) -> list[Job]:
    """The jobs that are not done yet, once all that they read and that no job makes has been found to be there.

    Raises:
        ValueError: A job that is done had another configuration; a task, its files, a corpus, a checkpoint or a model
            of another is missing or unfit.
    """
    pending = [job for job in recipe.jobs if not _is_done(recipe, job)]
    for job in pending:
        model, data = job.config.model, job.config.data
        try:
            for path in _given(recipe, model.start, model.teacher):
                run_checkpoint(path)
            if job.module.endswith("evaluate"):
                find_tests(job.config)
            else:
                check_files(replace(job.config, data=replace(data, train=_given(recipe, *data.train))))
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error
    return pending


def sweep(path: str | Path, settings: Sequence[str]) -> int:
    """Runs a recipe at every combination of settings `key=a,b`, and compares quality with what it took to make.

    Stage 1 and fine-tuning run once for all settings that have them alike, and a text is translated once. Writes
    sweep.csv, sweep.md and sweep.png into the recipe's folder.

    Raises:
        ValueError: As `load` and `check`; no key has several values, one is set twice, or one changes nothing.
    """
    fixed, varied = _varied(settings)
    if not varied:
        raise ValueError("no key has several values; write key=a,b, such as stage1.optim.steps=0,1000")
    if "recipe.dir" in varied:
        raise ValueError("recipe.dir takes one value: each setting has a folder in it")
    shared = load(path, fixed)
    folder, points, made = shared.folder, [], {}
    translations = shared.jobs[-1].config.evaluate.translations or folder / "sweep" / "translations"
    recipes = _settings(path, [f"evaluate.translations={translations}", *fixed], varied, folder / "sweep")
    _check_varied(configs.read(path, fixed), varied, list(recipes.values()))
    for recipe in recipes.values():
        check(recipe)
    for name, recipe in recipes.items():
        print(f"\n{name}", flush=True)
        _share(recipe, made)
        if status := run(recipe):
            return status
        points += [{"setting": name, **point} for point in _points(recipe)]
    if not points:
        raise ValueError("no foreign language was evaluated by every system, so there is no average to compare")
    plot_compute(points, folder / "sweep")
    print(f"\n{folder / 'sweep.md'}\n\n{(folder / 'sweep.md').read_text()}")
    return 0


def _launch(command: Sequence[str]) -> int:
    """The exit status; Ctrl-C is for the ranks, which save first, and is waited for, also by the launcher."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _settings(
    path: str | Path, fixed: Sequence[str], varied: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, Recipe]:
    """The recipe at each combination, by the name of its folder; all are read before the first runs."""
    found: dict[str, Recipe] = {}
    short = _short_names(list(varied))
    for values in itertools.product(*varied.values()):
        chosen = [f"{key}={value}" for key, value in zip(varied, values)]
        name = ",".join(f"{short[key]}={Path(value).name}" for key, value in zip(varied, values))
        if name in found:
            raise ValueError(f"two settings would share the folder {folder / name}; give values that end differently")
        found[name] = load(path, [*fixed, *chosen, f"recipe.dir={folder / name}"])
    return found


def _check_varied(tree: Mapping[str, Any], varied: Mapping[str, Sequence[str]], recipes: Sequence[Recipe]) -> None:
    """Raises: ValueError: A key's values make the same jobs, whatever the others': a run would meet itself.

    Args:
        recipes: At each combination, in the order of their product.
    """
    jobs = [[_read_by(job).replace(str(recipe.folder), "") for job in recipe.jobs] for recipe in recipes]
    combinations = list(itertools.product(*varied.values()))
    for place, key in enumerate(varied):
        first: dict[tuple, list[str]] = {}
        others = [(*values[:place], *values[place + 1 :]) for values in combinations]
        if any(first.setdefault(other, made) != made for other, made in zip(others, jobs)):
            continue
        section, _, name = key.partition(".")
        names = LENGTHS if section == "optim" and name in LENGTHS else {name}
        steps = [(step, tree.get(step, {}).get(section, {})) for step in TABLES]
        own = [f"{step}.{section}.{each}" for step, table in steps for each in sorted(names & table.keys())]
        fix = f"vary what overrides it, {' or '.join(own)}" if own else "no step that runs reads it"
        raise ValueError(f"{key}={','.join(varied[key])} changes nothing: {fix}")


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's shortest end, from a dot on, that no other key shares."""
    parts = {key: key.split(".") for key in keys}
    ends = {key: [".".join(each[first:]) for first in reversed(range(len(each)))] for key, each in parts.items()}
    others = {key: {end for other in keys if other != key for end in ends[other]} for key in keys}
    return {key: next((end for end in ends[key] if end not in others[key]), key) for key in keys}


def _given(recipe: Recipe, *paths: str) -> tuple[str, ...]:
    """Of paths, "" aside, those that no job makes: all but what lies in the recipe's folder."""
    return tuple(path for path in paths if path and not Path(path).is_relative_to(recipe.folder))


def _share(recipe: Recipe, made: dict[str, Path]) -> None:
    """Links what an earlier setting made of the same configuration, of jobs that stand on no other job.

    Args:
        made: Configuration, but for its folder -> the folder that it was first made in; added to.
    """
    for job in recipe.jobs:
        model, folder = job.config.model, recipe.folder / job.name
        if model.start or model.teacher:
            continue
        first = made.setdefault(dumps(replace(job.config, run=replace(job.config.run, dir="-"))), folder)
        if first != folder and not _is_done(recipe, job) and not folder.exists():
            recipe.folder.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(first, recipe.folder))
            _mark_done(recipe, job)


def _points(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Each system's average over the foreign languages, and what it took to make."""
    for table in results.summarise(results.load(recipe.results)):
        for system, scores in table.scores.items():
            score = scores.get(AVERAGE)
            if score is not None:
                row = {"dataset": table.dataset, "measure": table.measure, "system": system, "value": score.value}
                yield row | {"low": score.low, "high": score.high, **table.costs[system]}


def _read_by(job: Job) -> str:
    """The configuration; evaluation learns nothing."""
    return dumps(replace(job.config, optim=OptimConfig()) if job.module.endswith("evaluate") else job.config)


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
    if own["gpus"] < 1 or not own["seeds"] or any(type(seed) is not int for seed in own["seeds"]):
        raise ValueError("recipe.gpus must be at least 1, recipe.seeds a list of whole numbers")
    if len(set(own["seeds"])) < len(own["seeds"]):
        raise ValueError(f"recipe.seeds={own['seeds']} has one of them twice; each seed runs once")
    return own


def _trees(
    shared: Mapping[str, Any], steps: Mapping[str, Any], folder: Path, seeds: Sequence[int]
) -> Iterator[tuple[str, str, dict]]:
    """(name, module, configuration as a tree) of each job."""
    start = shared.get("model", {}).get("start", "")
    task = shared.get("task", {})
    untasked = {name: table for name, table in shared.items() if name not in ("task", "evaluate")}
    if _has_stage1(untasked.get("optim", {}), steps["stage1"].get("optim", {})):
        made = {"run": {"dir": str(folder / "stage1")}}
        yield "stage1", "train", _merged(untasked, steps["stage1"], made)
        start = str(folder / "stage1" / "checkpoints" / "latest")
    english = {key: value for key, value in task.items() if key != "test"}
    pick = "best" if task.get("validation") else "latest"
    for seed in seeds:
        names = {step: f"{step}-{seed}" for step in ("finetune", "distil", "evaluate")}
        own = {step: {"run": {"dir": str(folder / name), "seed": seed}} for step, name in names.items()}
        best = {step: str(folder / name / "checkpoints" / pick) for step, name in names.items()}
        made = {"objective": {"kind": "finetune", "reader": "llm"}, "task": english}
        made |= {"model": {"start": ""}}  # a stack's adapters are not the LLM's
        finetune = _merged(untasked, made, steps["finetune"], own["finetune"])
        yield names["finetune"], "finetune", finetune
        made = {"model": {"start": start, "teacher": best["finetune"]}, "task": english}
        distil = _merged(untasked, made, steps["distil"], own["distil"])
        if isinstance(name := distil.get("data", {}).get("targets"), str) and name:  # corpora may be others' too
            distil["data"]["targets"] = f"{name}-{seed}-{_teacher_digest(finetune, distil, steps['distil'])}"
            yield f"targets-{seed}", "targets", distil
        yield names["distil"], "train", distil
        made = {"model": {"start": best["distil"], "teacher": best["finetune"]}}
        made |= {"task": {key: value for key, value in task.items() if key in ("name", "test")}}
        made |= {
            "evaluate": {"results": str(folder / "results")},
        }
        data = {"data": steps["distil"].get("data", {}), "evaluate": shared.get("evaluate", {})}
        yield names["evaluate"], "evaluate", _merged(untasked, data, made, own["evaluate"])


def _teacher_digest(finetune: Mapping[str, Any], distil: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Eight letters that tell teachers apart: how the LLM learns the task, wherever, and how stage 2 has it read."""
    learned = finetune | {"run": {key: value for key, value in finetune["run"].items() if key != "dir"}}
    length = [distil["data"].get(key) for key in ("max_length", "truncation")]
    told = json.dumps([learned, own.get("model", {}), length], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _has_stage1(shared: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    lengths = own if LENGTHS & own.keys() else shared
    return str(lengths.get("steps", 1)) != "0" or (lengths is shared and bool(shared.get("epochs")))


def _job(name: str, module: str, tree: dict) -> Job:
    try:
        return Job(name=name, module=f"mtllm_engine.{module}", config=from_dict(tree))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Sections joined, later trees over earlier ones; optim.steps and optim.epochs replace one another."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for section, table in tree.items():
            replaced = LENGTHS if section == "optim" and LENGTHS & table.keys() else set()
            kept = {key: value for key, value in merged.get(section, {}).items() if key not in replaced}
            merged[section] = kept | table
    return merged


def _marker(recipe: Recipe, job: Job) -> Path:
    return recipe.folder / f"{job.name}.done"


def _digest(job: Job) -> str:
    return hashlib.sha256(dumps(job.config).encode()).hexdigest()


def _mark_done(recipe: Recipe, job: Job) -> None:
    _marker(recipe, job).write_text(_digest(job) + "\n")


def _stopped_after(job: Job) -> str:
    """How far a training got that was asked to stop, which ends it in order too; "" if it reached its last step."""
    run = Path(job.config.run.dir)
    latest = checkpoint.latest(run / "checkpoints")
    if latest is None:
        return ""
    done, steps = int(latest.name.rpartition("-")[2]), configs.load(run / "config.toml").optim.steps
    return f"after step {done} of {steps}" if done < steps else ""


def _is_done(recipe: Recipe, job: Job) -> bool:
    marker = _marker(recipe, job)
    if not marker.is_file():
        return False
    if marker.read_text().strip() != _digest(job):
        raise ValueError(f"{job.name} was made with other settings; remove {marker} and its folder, or set recipe.dir")
    return True


def _varied(settings: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings of one value, as they are, and keys of several values."""
    fixed, varied, seen = [], {}, set()
    for setting in settings:
        key, _, text = setting.partition("=")
        values = _split(text)
        if key in seen:
            raise ValueError(f"{key} is set twice; write it once, with all its values")
        seen.add(key)
        if len(values) > 1:
            varied[key] = values
        else:
            fixed.append(setting)
    return fixed, varied


def _split(text: str) -> list[str]:
    """At commas outside brackets: a list is one value."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values
