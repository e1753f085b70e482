"""What a run, a checkpoint, a sum or an exported folder holds, on one screen: `mtllm show X`.

Small files are read, and no model's weights.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtllm_engine import config as configs
from mtllm_engine.data.vocabulary import read_languages
from mtllm_engine.evaluation.systems import cost
from mtllm_engine.export.card import WHAT
from mtllm_engine.model import hub
from mtllm_engine.model.licences import licence_of
from mtllm_engine.training.log import learns
from mtllm_engine.training.origins import summed_in
from mtllm_engine.training.trained import Head, Trained, find_trained, head_of

FIRST = 6  # of the languages that are named
WIDEST = 160  # characters of a row
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def show(name: str, *, encoder: str = "", decoder: str = "", merged: Sequence[str] = ()) -> str:
    """A table of names and values. Args: as `find_trained`.

    Raises:
        ValueError: As `find_trained`.
    """
    trained = find_trained(name, encoder=encoder, decoder=decoder, merged=merged)
    rows = {**_what(trained), **_models(trained), **_tasks(trained), **_made(trained)}
    rows["size"] = _size(trained)
    width = max(map(len, rows))
    shown = {key: value for key, value in rows.items() if value}
    return "\n".join(f"{key:<{width}}  {_short(value)}" for key, value in shown.items())


def _what(trained: Trained) -> dict[str, str]:
    """What it is, and what it was to learn."""
    if trained.is_exported:
        return {"is": f"an exported folder, {trained.folder}"}
    if parts := summed_in(trained.folder):
        rows = {f"part {number}": str(part) for number, part in enumerate(parts, start=1)}
        return {"is": f"a sum, {trained.folder}", **rows}
    if not trained.run:
        return {"is": f"a checkpoint, {trained.folder}"}
    name = trained.folder.resolve().name
    learned = learns(configs.load(trained.run / "config.toml"))
    return {"is": f"checkpoint {name} of the run {trained.run}", "learned": learned}


def _models(trained: Trained) -> dict[str, str]:
    """The models that it stands on, and how they read a text."""
    model, data, lora = trained.config.model, trained.config.data, trained.config.lora
    attention = "causal" if model.causal else "bidirectional"
    kept = model.dtype if model.quantization == "none" else f"{model.dtype}, {model.quantization}"
    parts = {"whole": "whole", "lines": "line by line", "sentences": "sentence by sentence"}
    reads = f"up to {data.max_length} tokens, {data.truncation} truncation"
    behind = f" behind {model.encoder_prefix!r}" if model.encoder_prefix else ""
    adapters = f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}"
    bias = "with a bias" if model.projection_bias else "without a bias"
    return {
        "encoder": _licensed(trained, "encoder") if trained.reads_stack else "",
        "LLM": f"{_licensed(trained, 'llm')}, {attention}, {kept}",
        "merged": _merged(trained),
        "languages": _languages(trained) if trained.reads_stack else "",
        "texts": f"read {parts[data.parts]}{behind}, {reads}",
        "adapters": "merged into the LLM's weights" if trained.is_merged else adapters,
        "projection": bias if trained.reads_stack else "none: the LLM reads its own tokens",
    }


def _merged(trained: Trained) -> str:
    """The adapters that were merged into the LLM first, in order, and their licences."""
    if trained.is_exported:
        about = trained.record["about"]
        each = {name: about["licences"][name] for name in about.get("adapters", ())}
    else:
        each = {name: licence_of(name) for name in trained.config.model.adapters}
    return " then ".join(f"{name}, licence {licence}" for name, licence in each.items())


def _licensed(trained: Trained, which: str) -> str:
    """A model and its licence; an exported folder's by the name that it had in training."""
    if trained.is_exported:
        about = trained.record["about"]
        name, licences = about[which], about["licences"]
        return f"{name}, licence {licences[name]}"
    model = trained.config.model
    name = model.encoder if which == "encoder" else model.decoder
    return f"{name}, licence {licence_of(name)}"


def _languages(trained: Trained) -> str:
    """How many, and the first of them."""
    encoder, fallback = trained.config.model.encoder, trained.config.languages.fallback
    try:
        known = read_languages(_on_disk(encoder))
    except (ValueError, OSError) as error:
        return f"not known: {error}"
    codes, given = known.readable(fallback), fallback if known.is_told else {}
    more = ", ..." if len(codes) > FIRST else ""
    instead = "".join(f"; {code} as {each}" for code, each in sorted(given.items()))
    return f"{len(codes)}: {', '.join(codes[:FIRST])}{more}{instead}"


def _on_disk(model: str) -> Path:
    """A model's folder; a hub id's where it has been downloaded: nothing is fetched here."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return hub.cached(model)
    except Exception:  # the client raises a dozen unrelated types
        raise ValueError(f"{model} is not on this machine") from None


def _tasks(trained: Trained) -> dict[str, str]:
    """The head, and those of tasks that travel along."""
    rows = {}
    if head := trained.head:
        rows["task"] = _said(trained.task, head)
    added = trained.record.get("tasks", {})
    for name, folder in trained.tasks.items():
        head = head_of(folder, name, added.get(name, {}).get("labels", ()))
        rows[f"task {name}"] = _said("", head) if head else ""
    return rows


def _said(task: str, head: Head) -> str:
    labels = f": {', '.join(head.labels)}" if head.labels else ""
    outputs = {"span": "", "choice": f" of {head.num_outputs}"}
    count = outputs.get(head.kind, f" into {head.num_outputs}")
    return f"{task} {head.kind}{count}{labels}".strip()


def _made(trained: Trained) -> dict[str, str]:
    """How far it came, how good it was found, what that took and with which code."""
    if trained.is_exported:
        runs = trained.record["about"]["runs"]
        return {f"run {number}": _ran(run) for number, run in enumerate(runs, start=1)}
    rows = {}
    hours, flops = cost([str(trained.folder)])
    if trained.run:
        step = trained.record["step"]
        planned = configs.load(trained.run / "config.toml").optim.steps
        rows["steps"] = f"{step:,}" + (f" of {planned:,}" if planned else "")
        rows["validation"] = _validation(trained.run, step)
        environment = json.loads((trained.run / "environment.json").read_text())
        rows["commit"] = environment["commit"] or "not known: not run in a checkout"
    rows["cost"] = "not known" if hours is None else f"{hours:.3g} GPU-hours, {flops:.3g} FLOPs"
    return rows


def _ran(about: Mapping[str, Any]) -> str:
    """A run that an exported folder stands on."""
    what = " ".join(filter(None, (WHAT[about["what"]], about["task"])))
    measured = f"; validation {_measured(about['validation'])}" if about["validation"] else ""
    return f"{what}, {about['steps']:,} steps{measured}; commit {about['commit'] or 'not known'}"


def _validation(run: Path, step: int) -> str:
    """What was last measured up to a step."""
    found: Mapping[str, float] = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "validation_documents" in row and row["step"] <= step:
            found = row
    return _measured(found)


def _measured(row: Mapping[str, float]) -> str:
    names = {key: key.removeprefix("validation_") for key in row}
    return ", ".join(f"{names[key]} {value:.4g}" for key, value in row.items())


def _size(trained: Trained) -> str:
    def count(folder: Path) -> str:
        size, unit = float(sum(_bytes_below(folder))), 0
        while size >= 1000 and unit < len(UNITS) - 1:
            size, unit = size / 1000, unit + 1
        return f"{size:.3g} {UNITS[unit]}"

    run = f" (all of the run: {count(trained.run)})" if trained.run else ""
    return count(trained.folder) + run


def _bytes_below(folder: Path) -> Iterator[int]:
    files = (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return (path.stat().st_size for path in files)


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 4]} ..."
