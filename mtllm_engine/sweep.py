"""A recipe at every combination of settings: quality against what it took to make.

What settings have alike is made once: stage 1, fine-tuning, translations.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtllm_engine import config as configs
from mtllm_engine.config import OptimConfig, dumps
from mtllm_engine.evaluation import predictions
from mtllm_engine.evaluation.bootstrap import AVERAGE, summarise
from mtllm_engine.evaluation.provenance import sort_out
from mtllm_engine.evaluation.tables import plot_compute
from mtllm_engine.recipe import LENGTHS, TABLES, Job, Recipe, check, is_done, load, mark_done, run


def sweep(path: str | Path, settings: Sequence[str]) -> int:
    """Runs a recipe at every combination of settings `key=a,b`, and compares quality with what it
    took to make.

    Stage 1 and fine-tuning run once for all settings that have them alike, and a text is translated
    once. Writes sweep.csv, sweep.md and sweep.png into the recipe's folder.

    Raises:
        ValueError: As `load` and `check`; no key has several values, one is set twice, or one
            changes nothing.
    """
    fixed, varied = _varied(settings)
    if not varied:
        example = "write key=a,b, such as stage1.optim.steps=0,1000"
        raise ValueError(f"no key has several values; {example}")
    if "recipe.dir" in varied:
        raise ValueError("recipe.dir takes one value: each setting has a folder in it")
    shared = load(path, fixed)
    folder, points, first = shared.folder, [], {}
    translations = shared.jobs[-1].config.evaluate.translations or folder / "sweep" / "translations"
    common = [f"evaluate.translations={translations}", *fixed]
    recipes = _settings(path, common, varied, folder / "sweep")
    _check_varied(configs.read(path, fixed), varied, list(recipes.values()))
    for recipe in recipes.values():
        check(recipe)
    for name, recipe in recipes.items():
        print(f"\n{name}", flush=True)
        share(recipe, first)
        if status := run(recipe):
            return status
        points += [{"setting": name, **point} for point in _points(recipe)]
    if not points:
        reason = "no foreign language was evaluated by every system"
        raise ValueError(f"{reason}, so there is no average to compare")
    plot_compute(points, folder / "sweep")
    print(f"\n{folder / 'sweep.md'}\n\n{(folder / 'sweep.md').read_text()}")
    return 0


def first_setting(settings: Sequence[str]) -> list[str]:
    """`key=a,b` as overrides of the first combination.

    Raises:
        ValueError: A key is set twice.
    """
    fixed, varied = _varied(settings)
    return [*fixed, *(f"{key}={values[0]}" for key, values in varied.items())]


def _settings(
    path: str | Path, fixed: Sequence[str], varied: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, Recipe]:
    """The recipe at each combination, by the name of its folder; all are read before the first
    runs."""
    recipes: dict[str, Recipe] = {}
    short = _short_names(list(varied))
    for values in itertools.product(*varied.values()):
        chosen = [f"{key}={value}" for key, value in zip(varied, values)]
        name = ",".join(f"{short[key]}={Path(value).name}" for key, value in zip(varied, values))
        if name in recipes:
            shared = f"two settings would share the folder {folder / name}"
            raise ValueError(f"{shared}; give values that end differently")
        recipes[name] = load(path, [*fixed, *chosen, f"recipe.dir={folder / name}"])
    return recipes


def _check_varied(
    tree: Mapping[str, Any], varied: Mapping[str, Sequence[str]], recipes: Sequence[Recipe]
) -> None:
    """Raises: ValueError: A key's values make the same jobs, whatever the others': a run would meet
    itself.

    Args:
        recipes: At each combination, in the order of their product.
    """
    # What each combination's jobs read, wherever they lie: equal where a key changes nothing.
    jobs = [[_read_by(job).replace(str(each.folder), "") for job in each.jobs] for each in recipes]
    combinations = list(itertools.product(*varied.values()))
    for index, key in enumerate(varied):
        # The key matters if two combinations that differ in it alone have different jobs.
        others = [(*values[:index], *values[index + 1 :]) for values in combinations]
        first: dict[tuple, list[str]] = {}
        if any(first.setdefault(other, each) != each for other, each in zip(others, jobs)):
            continue
        # If not, a step has a value of its own for it, or nobody reads it: say which.
        section, _, name = key.partition(".")
        names = LENGTHS if section == "optim" and name in LENGTHS else {name}
        tables = {step: tree.get(step, {}).get(section, {}).keys() & names for step in TABLES}
        own = [f"{step}.{section}.{n}" for step, keys in tables.items() for n in sorted(keys)]
        fix = f"vary what overrides it, {' or '.join(own)}" if own else "no step that runs reads it"
        raise ValueError(f"{key}={','.join(varied[key])} changes nothing: {fix}")


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's shortest end, from a dot on, that no other key shares."""
    parts = {key: key.split(".") for key in keys}
    ends = {
        key: [".".join(each[first:]) for first in reversed(range(len(each)))]
        for key, each in parts.items()
    }
    others = {key: {end for other in keys if other != key for end in ends[other]} for key in keys}
    return {key: next((end for end in ends[key] if end not in others[key]), key) for key in keys}


def share(recipe: Recipe, first: dict[str, Path]) -> None:
    """Links what an earlier setting made of the same configuration, of jobs that stand on no other
    job.

    Args:
        first: Configuration, but for its folder -> the folder that it was first run in; added to.
    """
    for job in recipe.jobs:
        model, folder = job.config.model, recipe.folder / job.name
        if model.init_from or model.teacher:
            continue
        anywhere = replace(job.config, run=replace(job.config.run, dir="-"))
        earlier = first.setdefault(dumps(anywhere), folder)
        if earlier != folder and not is_done(recipe, job) and not folder.exists():
            recipe.folder.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(earlier, recipe.folder))
            mark_done(recipe, job)


def _points(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Each system's average over the foreign languages, and what it took to make."""
    for table in summarise(sort_out(predictions.load(recipe.results, damaged=[]))[0]):
        for system, scores in table.scores.items():
            if score := scores.get(AVERAGE):
                row = {"dataset": table.dataset, "measure": table.measure, "system": system}
                interval = {"value": score.value, "low": score.low, "high": score.high}
                yield row | interval | table.costs[system]


def _read_by(job: Job) -> str:
    """The configuration; evaluation learns nothing."""
    learns = not job.module.endswith("evaluate")
    return dumps(job.config if learns else replace(job.config, optim=OptimConfig()))


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
