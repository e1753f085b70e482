"""Imports point down: every file has a room, and reads rooms below it and its own, in no circle.

A new file needs no word here where its folder has one; a new file at the top of the package does.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from tests.support.machine import ROOT

PACKAGE = "mtllm_engine"
FOUNDATIONS = ("", "config", "world", "languages", "files", "spans", "progress")
COMMANDS = ("cli", "train", "finetune", "targets", "evaluate", "recipe", "sweep")
COMMANDS += ("encode", "models", "show", "validate", "inspection", "doctor", "dry_run")
COMMANDS += ("plan", "outlook")
LAYERS = (  # from below; rooms of one layer do not know each other
    {"foundations": FOUNDATIONS},
    {"kernels": ("kernels", "kernels.*")},
    {"data": ("data", "data.*")},
    {
        "model": ("model", "model.*"),
        "tasks": ("tasks", "tasks.*"),
        "babel": ("babel", "babel.*"),
    },
    {"training": ("training", "training.*")},
    {"evaluation": ("evaluation", "evaluation.*"), "inference": ("inference",)},
    {"export": ("export", "export.*")},
    {"commands": COMMANDS},
    {"benchmarks": ("benchmarks", "benchmarks.*")},
)
HOMES = {  # of large libraries: nobody else imports them
    "deepspeed": {"training.engine"},
    "webdataset": {"data.sources", "data.tars"},
}
NOT_FOR_DISTILLATION = {
    f"{PACKAGE}.{name}" for name in ("tasks", "data.sources", "training.report", "training.probe")
} | {"matplotlib"}


def files() -> dict[str, Path]:
    """Every file by its module's name, `mtllm_engine.` aside."""
    named = {}
    for folder, prefix in (
        (PACKAGE, ()),
        ("kernels", ("kernels",)),
        ("benchmarks", ("benchmarks",)),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            *parts, last = path.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join([*prefix, *parts, *([] if last == "__init__" else [last])])] = path
    return named


FILES = files()


def imported(name: str) -> Iterator[str]:
    """The full names that a file imports, wherever in it: in functions and for types alone, too."""
    path = FILES[name]
    parts = [PACKAGE, *filter(None, name.split("."))]
    package = parts if path.stem == "__init__" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def arrows(name: str) -> set[str]:
    """The files of ours that a file imports."""
    targets = set()
    for full in imported(name):
        parts = full.removeprefix(f"{PACKAGE}.").split(".")
        if full.split(".")[0] in (PACKAGE, "benchmarks"):
            ends = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
            targets.add(next(end for end in ends if end in FILES))
    return targets


def room_of(name: str) -> tuple[int, str]:
    """Number of the layer, and room."""
    homes = [
        (number, room)
        for number, layer in enumerate(LAYERS)
        for room, patterns in layer.items()
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]
    assert len(homes) == 1, f"{name} is in {homes}: say in LAYERS where it belongs"
    return homes[0]


def test_no_import_climbs():
    climbing = []
    for name in FILES:
        layer, room = room_of(name)
        for target in arrows(name):
            other_layer, other_room = room_of(target)
            if other_layer >= layer and other_room != room:
                climbing.append(f"{name} ({room}) imports {target} ({other_room})")
    assert not climbing


def test_no_imports_make_a_circle():
    graph = {name: arrows(name) - {name} for name in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" is imported by ".join(error.args[1])) from None


def test_large_libraries_have_one_home():
    roots = {name: {full.split(".")[0] for full in imported(name)} for name in FILES}
    for library, homes in HOMES.items():
        assert {name for name in FILES if library in roots[name]} == homes


def test_what_only_distils_imports_no_task_source_report_or_probe():
    program = f"import sys, {PACKAGE}.train; print('loaded:', *sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded:" and f"{PACKAGE}.training.step" in loaded
    assert not NOT_FOR_DISTILLATION & set(loaded)
