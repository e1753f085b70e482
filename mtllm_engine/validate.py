"""`mtllm validate`: everything that is wrong with a configuration or a recipe, all at once, before
anything is loaded; or what would run.
"""

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtllm_engine import config as configs
from mtllm_engine.doctor import gigabytes
from mtllm_engine.inspection import Inspection, ask, line_of, nearest_folder

COMMANDS = ("train", "finetune", "targets", "evaluate")
OF_A_RUN = ("run", "learns", "starts from", "step", "corpora")  # rows that each step has of its own


@dataclass
class Report:
    """What was found; without problems the command can start."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=dict)
    """What would run, by name, as far as that is known before weights are read."""


def validate(
    path: str,
    overrides: Sequence[str] = (),
    *,
    command: str = "",
    gpus: int = 1,
    describe: bool = False,
) -> Report:
    """Looks at all that a command would read.

    Args:
        command: One of COMMANDS, or "run" for a recipe; "": what the file is for.
        gpus: The number of ranks; a recipe says its own.
        describe: Whether a report without problems has a header.
    """
    try:
        tree = configs.read(path)
    except ValueError as error:
        return Report([line_of(error)])
    unusable: list[str] = []
    for item in overrides:
        try:
            configs.override(tree, item)
        except ValueError as error:
            unusable.append(line_of(error))
    is_recipe = command == "run" or (not command and "recipe" in tree)
    look = _look_at_recipe if is_recipe else _look_at_config
    report = look(tree, path, command or _command_of(tree), gpus, describe)
    report.problems[:0] = unusable
    return report


def _command_of(tree: Mapping[str, Any]) -> str:
    """What a configuration is for, where nobody says it."""
    tables = {name: each for name, each in tree.items() if isinstance(each, Mapping)}
    if tables.get("objective", {}).get("kind") == "finetune":
        return "finetune"
    optim = tables.get("optim", {})
    learns = optim.get("steps") or optim.get("epochs")
    return "evaluate" if tables.get("task", {}).get("test") and not learns else "train"


def _look_at_config(
    tree: dict[str, Any], path: str, command: str, gpus: int, describe: bool
) -> Report:
    objective = tree.get("objective", {})
    if command == "finetune" and isinstance(objective, Mapping):
        tree["objective"] = {"reader": "llm", **objective, "kind": "finetune"}
    inspection = Inspection(configs.examine(tree), command, gpus).looked()
    report = Report(inspection.problems, inspection.warnings)
    _look_at_room(report, [inspection])
    if describe and not report.problems:
        report.header = {"command": f"mtllm {command}"} | inspection.header()
    return report


def _look_at_recipe(
    tree: dict[str, Any], path: str, command: str, gpus: int, describe: bool
) -> Report:
    from mtllm_engine import recipe

    draft = recipe.examine(tree, path)
    steps: dict[str, Inspection] = {}
    said: dict[str, list[str]] = defaultdict(list)  # a problem -> the steps that have it
    for name, module, examined in draft.jobs:
        step = name.rpartition("-")[0] or name
        is_new = step not in steps
        inspection = Inspection(examined, module, draft.gpus, made_in=draft.folder)
        if is_new:  # other seeds read the same
            steps[step] = inspection.looked()
        for problem in inspection.problems:
            said[problem] += [] if step in said[problem] else [step]
    report = Report(list(draft.problems))
    for problem, names in said.items():
        where = "" if len(names) == len(steps) else f"{', '.join(names)}: "
        report.problems.append(where + problem)
    inspections = list(steps.values())
    _look_at_room(report, inspections)
    if not report.problems:  # what was made with other settings, if anything
        ask(report.problems, lambda: recipe.check(draft.recipe()))
    if describe and not report.problems:
        report.header = {"command": f"mtllm run, {draft.gpus} ranks", "folder": str(draft.folder)}
        for step, inspection in steps.items():
            report.header[step] = inspection.summary()
        shared = next((each.header() for each in inspections if each.stack), {})
        report.header |= {name: row for name, row in shared.items() if name not in OF_A_RUN}
    return report


def _look_at_room(report: Report, inspections: Sequence[Inspection]) -> None:
    """Memory, of the step that needs most; and disks, which all steps fill."""
    memories = [each.memory for each in inspections if each.memory]
    if memories:
        worst = max(memories, key=lambda each: each.held)
        largest = max(memories, key=lambda each: each.needed)
        if worst.held > worst.there:
            report.problems.append(worst.refusal())
        elif largest.needed > largest.there:
            report.warnings.append(largest.warning())
    needed: dict[int, int] = defaultdict(int)
    places: dict[int, Path] = {}
    for each in inspections:
        if each.disk_bytes and each.knows("run.dir", "checkpoint.keep"):
            place = nearest_folder(Path(each.config.run.dir))
            places[place.stat().st_dev] = place
            needed[place.stat().st_dev] += each.disk_bytes
    for device, place in places.items():
        total, _, free = shutil.disk_usage(place)
        if total and needed[device] > free:
            sizes = f"checkpoints need {gigabytes(needed[device])}"
            sizes += f", and {place} has {gigabytes(free)} free"
            report.problems.append(f"run.dir: {sizes}; lower checkpoint.keep, or choose another")
