"""`mtllm plan`: what a configuration or recipe will take on GPUs that need not be there: memory,
bytes between ranks, time; and what would be faster, or what makes it fit.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mtllm_engine import config as configs
from mtllm_engine import recipe as recipes
from mtllm_engine.config import Config
from mtllm_engine.outlook import (
    Estimate,
    Settings,
    Subject,
    chosen,
    examine,
    fastest,
    layouts_of,
    smallest_change,
    with_lanes,
)
from mtllm_engine.tasks import find_dataset, load_task
from mtllm_engine.training import memory
from mtllm_engine.training.gpus import GPUS, Cluster, Gpu, find_gpu, gpu_of
from mtllm_engine.training.traffic import Command

READS: dict[str, Command] = {"stack": "read", "sum": "read"}
READS |= dict.fromkeys(("llm", "translate_test"), "targets")
"""How systems read test sets; the encoder alone takes next to nothing."""


def plan(
    path: str,
    overrides: Sequence[str] = (),
    *,
    gpu: str = "",
    gpus: int | None = None,
    nodes: int = 1,
) -> str:
    """The plan of a configuration or a recipe, as it is printed.

    Args:
        gpu: One of `gpus.GPUS`; "": the one that is there.
        gpus: Of a node; None: one, or as many as a recipe says.

    Raises:
        ValueError: No such GPU, a number below 1, or what the file says of keys and models does not
            hold.
    """
    for name, number in (("--gpus", gpus), ("--nodes", nodes)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    tree = configs.read(path, overrides)
    kind = find_gpu(gpu) if gpu else _gpu_there()
    if "recipe" in tree:
        recipe = recipes.load(path, overrides)
        cluster = Cluster(gpu=kind, gpus=gpus or recipe.gpus, nodes=nodes)
        return "\n".join(_plan_recipe(recipe, cluster))
    config = configs.from_dict(tree)
    if not (config.optim.steps or config.optim.epochs):
        raise ValueError(f"nothing is trained by {path}: plan a recipe, or set optim.steps")
    cluster = Cluster(gpu=kind, gpus=gpus or 1, nodes=nodes)
    return "\n".join(_plan_config(config, cluster))


def _gpu_there() -> Gpu:
    """Raises: ValueError: There is none, or one that has no row."""
    known = f"name one by --gpu {'|'.join(GPUS)}"
    if not torch.cuda.is_available():
        raise ValueError(f"there is no GPU here that PyTorch sees; {known}")
    device = torch.cuda.get_device_properties(0)
    name = gpu_of(device.name, device.total_memory)
    if name is None:
        raise ValueError(f"the GPU here, {device.name}, is none that is known; {known}")
    return GPUS[name]


def _plan_config(config: Config, cluster: Cluster) -> Iterator[str]:
    notes: list[str] = []
    config = with_lanes(config, cluster, notes)
    subject = examine(config, notes)
    estimates = [subject.estimate(cluster, each) for each in layouts_of(config, cluster)]
    yield from _named(_about(subject, cluster, notes))
    yield ""
    yield from memory_table(estimates)
    yield ""
    yield from step_table(subject, estimates)
    yield ""
    yield from _advice(subject, cluster, estimates)


def _about(subject: Subject, cluster: Cluster, notes: Sequence[str]) -> Iterator[tuple[str, str]]:
    data, gpu = subject.config.data, cluster.gpu
    nodes = f", {cluster.nodes} nodes of {cluster.gpus}" if cluster.nodes > 1 else ""
    yield "GPUs", f"{cluster.size} x {gpu.name} of {gpu.gbytes:g} GB{nodes} ({gpu.source})"
    pack = (
        f"{data.pack_documents} documents" if data.pack_documents else f"{data.pack_tokens} tokens"
    )
    yield "a step", f"{data.lanes} packs of {pack}"
    for note in notes:
        yield "note", note


def memory_table(estimates: Sequence[Estimate]) -> list[str]:
    """A GPU's memory, part by part, a column for each layout."""
    names = dict.fromkeys(row.name for each in estimates for row in each.rows)
    by_name = [{row.name: row.bytes for row in each.rows} for each in estimates]
    card = estimates[0].step.cluster.gpu.gbytes
    table = [["memory of a GPU, GB", *(each.layout.name for each in estimates)]]
    for name in sorted(names, key=_order):
        table.append([f"  {name}", *(_gb(sizes.get(name)) for sizes in by_name)])
    table.append(["  together", *(_gb(each.bytes) for each in estimates)])
    fits = ["fits" if each.fits else "does not fit" for each in estimates]
    return _aligned([*table, [f"  of {card:g}", *fits]])


def step_table(subject: Subject, estimates: Sequence[Estimate]) -> list[str]:
    """What a step sends and takes, and the run."""
    steps = [each.step for each in estimates]
    table = [
        ["a step", *(each.layout.name for each in estimates)],
        ["  micro-batches", *(str(step.work.micro_batches) for step in steps)],
        ["  weights gathered, GB", *(_gb(step.traffic.gathered or None) for step in steps)],
        ["  gradients reduced, GB", *(_gb(step.traffic.reduced or None) for step in steps)],
        ["  seconds", *(f"{step.seconds:.3f}" for step in steps)],
        ["  bound by", *(step.bound for step in steps)],
        ["  pairs/s", *(f"{step.pairs_per_s:,.0f}" for step in steps)],
        ["  MFU", *(f"{step.mfu:.1%}" for step in steps)],
    ]
    count = subject.num_steps
    if count is None:
        table.append(["the run", *("epochs of corpora that are not here" for _ in steps)])
    else:
        table.append([f"{count:,} steps, hours", *(hours(count * step.seconds) for step in steps)])
        of_gpus = (hours(count * step.seconds * step.cluster.size) for step in steps)
        table.append(["  GPU-hours", *of_gpus])
    return _aligned(table)


def _order(name: str) -> int:
    """Weights first, then what learns, then what a micro-batch needs."""
    rows = [*memory.HELD, "small ones kept whole", "gathered weights", "a linear made full"]
    rows += ["a linear's transpose", "gradient bucket", "saved activations"]
    return rows.index(name) if name in rows else len(rows)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds >= 360 else f"{seconds / 3600:.4f}"


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3f} s"


def _gb(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e9:,.2f}"


def _aligned(table: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, and all others as wide as they must be."""
    rows = list(table)
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
        for first, *others in rows
    ]


def _named(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values, one a line."""
    given = list(rows)
    width = max(len(name) for name, _ in given)
    return [f"{name:<{width}}  {value}" for name, value in given]


def _advice(
    subject: Subject, cluster: Cluster, estimates: Sequence[Estimate], prefix: str = ""
) -> list[str]:
    """What would be faster, and what makes it fit. Args: prefix: Of keys, as a recipe has them."""
    asked, found = chosen(subject.config, estimates), fastest(subject, cluster)
    lines = []
    if not asked.fits:
        change = smallest_change(subject, cluster, asked.layout)
        lines.append(
            ("to fit", _words(change, prefix) if change else "nothing that is tried helps")
        )
    if found:
        settings, best = found
        gain = best.step.pairs_per_s / asked.step.pairs_per_s
        speed = f"{best.step.seconds:.3f} s a step, {best.step.pairs_per_s:,.0f} pairs/s"
        more = f", {gain:.2f} x" if settings and asked.fits else ""
        used = f"{best.bytes / 1e9:.1f} GB of a GPU"
        lines.append(("fastest", f"{_words(settings, prefix)}: {speed}{more}, {used}"))
    return _named(lines) if lines else []


def _words(settings: Settings, prefix: str) -> str:
    """As they are put behind `mtllm train CONFIG`."""
    keys = " ".join(f"{prefix}{key}={value}" for key, value in settings.items() if key != "gpus")
    on = f"on {settings['gpus']} GPUs " if "gpus" in settings else ""
    return f"{on}{keys}" if settings else "as it is"


class _Line(NamedTuple):
    """A step of a recipe, over all its seeds."""

    name: str
    runs: int
    estimate: Estimate
    steps: int | None
    seconds: float | None


def _plan_recipe(recipe: recipes.Recipe, cluster: Cluster) -> Iterator[str]:
    notes: list[str] = []
    grouped: dict[str, list[recipes.Job]] = {}
    for job in recipe.jobs:
        grouped.setdefault(job.name.rpartition("-")[0] or job.name, []).append(job)
    made = [job.config for job in recipe.jobs]
    lines, longest = [], None
    for name, jobs in grouped.items():
        module = jobs[0].module.rpartition(".")[2]
        config = with_lanes(jobs[0].config, cluster, notes)
        command = {"targets": "targets", "evaluate": "read"}.get(module, "train")
        own: list[str] = []
        subject = examine(config, own, command=command, made=made)
        notes += [each if each.startswith("model.") else f"{name}: {each}" for each in own]
        if command == "read":
            line = _evaluation(name, len(jobs), subject, cluster, notes)
        else:
            line = _training(name, len(jobs), subject, cluster)
        if command == "train" and line.seconds and line.seconds > (longest or (0,))[0]:
            longest = (line.seconds, name, subject)
        lines.append(line)
    nodes = f", {cluster.nodes} nodes of {cluster.gpus}" if cluster.nodes > 1 else ""
    about = [("GPUs", f"{cluster.size} x {cluster.gpu.name} of {cluster.gpu.gbytes:g} GB{nodes}")]
    about += [("note", note) for note in dict.fromkeys(notes)]
    about.append(("note", "validation, checkpoints, reading of data and starts are not counted"))
    yield from _named(about)
    yield ""
    yield from _recipe_table(lines, cluster)
    if longest:
        _, name, subject = longest
        estimates = [
            subject.estimate(cluster, each) for each in layouts_of(subject.config, cluster)
        ]
        advice = _advice(subject, cluster, estimates, prefix=f"{name}.")
        yield from ["", f"the longest of them, {name}:", *advice]


def _training(name: str, runs: int, subject: Subject, cluster: Cluster) -> _Line:
    layouts = layouts_of(subject.config, cluster)
    estimate = chosen(subject.config, [subject.estimate(cluster, each) for each in layouts])
    steps = subject.num_steps
    if subject.command == "targets":
        data = subject.config.data
        pack = data.pack_documents or data.pack_tokens / subject.texts.longer
        known = subject.num_documents
        steps = None if known is None else math.ceil(known / (data.lanes * pack))
    return _Line(name, runs, estimate, steps, steps and runs * steps * estimate.step.seconds)


def _evaluation(
    name: str, runs: int, subject: Subject, cluster: Cluster, notes: list[str]
) -> _Line:
    """Every system reads every example once."""
    config = subject.config
    layouts = layouts_of(config, cluster)
    estimate = chosen(config, [subject.estimate(cluster, each) for each in layouts])
    count, step = _num_examples(config, notes), estimate.step
    if count is None:
        return _Line(name, runs, estimate, None, None)
    seconds = 0.0
    documents = step.work.documents / step.work.packs * config.data.lanes
    for reads in [READS[system] for system in config.evaluate.systems if system in READS]:
        own = replace(subject, command=reads).estimate(cluster, estimate.layout)
        seconds += count / documents * own.step.seconds
    if "translate_test" in config.evaluate.systems:
        notes.append("evaluation: translation is not counted, which writes token by token")
    return _Line(name, runs, estimate, math.ceil(count / documents), runs * seconds)


def _num_examples(config: Config, notes: list[str]) -> int | None:
    """Of all test sets, in all languages that are evaluated."""
    count = 0
    for source in config.task.test:
        try:
            dataset, folder = find_dataset(load_task(config.task.name), source)
            languages = config.evaluate.languages or dataset.present(folder, "test")
            for each in languages:
                code = dataset.languages.get(each, each)
                count += sum(1 for _ in dataset.read(folder, "test", code))
        except (ValueError, OSError) as error:
            notes.append(f"evaluation is not counted: {' '.join(str(error).split())}")
            return None
    return count


def _recipe_table(lines: Sequence[_Line], cluster: Cluster) -> list[str]:
    head = ["step", "runs", "steps", "layout", "GB of a GPU", "s a step", "time", "GPU-hours"]
    table = [head]
    for each in lines:
        estimate, known = each.estimate, each.seconds is not None
        spent = each.seconds or 0.0
        table.append(
            [
                each.name,
                str(each.runs),
                f"{each.steps:,}" if each.steps is not None else "not known",
                estimate.layout.name,
                f"{estimate.bytes / 1e9:.1f}{'' if estimate.fits else ' (too much)'}",
                f"{estimate.step.seconds:.3f}",
                _duration(spent) if known else "-",
                hours(spent * cluster.size) if known else "-",
            ]
        )
    spent = sum(each.seconds or 0.0 for each in lines)
    table.append(["together", "", "", "", "", "", _duration(spent), hours(spent * cluster.size)])
    return _aligned(table)
