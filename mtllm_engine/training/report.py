"""A run on one page: report.html with its curve and its numbers."""

import base64
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LABELS = {"fvu": "FVU", "accuracy": "accuracy"}  # as tables call them
PROBE = ("fvu", "cosine", "retrieval")
STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto}"
    "th{text-align:left;padding-right:2em}img{max-width:100%}"
)
Y_LABELS = {"fvu": "fraction of variance unexplained", "accuracy": "accuracy"}


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training rows and the validation rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [
        row for row in rows if "validation_documents" in row
    ]


def read_probe(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    """What the cross-lingual probe measured: by step, by language ("" for their mean), by name."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            name, _, language = key.removeprefix("probe_").partition("/")
            if name in PROBE and key.startswith("probe_"):
                found.setdefault(row["step"], {}).setdefault(language, {})[name] = value
    return found


def write_report(folder: Path) -> Path:
    """Writes curve.png, probe.png where there was a probe, and report.html into a run's folder;
    returns the latter.
    """
    cells = "".join(_row(key, [value]) for key, value in summary(folder).items())
    settings = html.escape((folder / "config.toml").read_text())
    page = folder / "report.html"
    title, curve = html.escape(folder.name), _image(plot_curve(folder), "training curve")
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{curve}<table>{cells}</table>{_probe_section(folder)}"
        f"<h2>Configuration</h2><pre>{settings}</pre>"
    )
    return page


def summary(folder: Path) -> dict[str, str]:
    """What a run came to, as names and values."""
    training, validation = read_metrics(folder)
    environment = json.loads((folder / "environment.json").read_text())
    steady = training[len(training) // 4 :]  # the first steps warm caches and compile
    rates = sorted(row["pairs_per_s"] for row in steady)
    rows = {"steps": str(training[-1]["step"])}
    for name, label in LABELS.items():
        values = [row[f"validation_{name}"] for row in validation if f"validation_{name}" in row]
        if values:
            rows[f"held-out {label} before"], rows[f"held-out {label} after"] = (
                f"{values[0]:.4f}",
                f"{values[-1]:.4f}",
            )
    if validation:
        rows["held-out documents"] = f"{validation[-1]['validation_documents']}"
    loss = training[-1]["loss"]
    rows["loss, last step"] = "not finite" if loss is None else f"{loss:.6f}"
    if bad := sum(row["grad_norm"] is None for row in training):
        rows["steps without an update"] = f"{bad}: skipped.jsonl names what they read"
    rows["pair tokens/s, median"] = f"{rates[len(rates) // 2]:,.0f}"
    rows["documents skipped"] = str(training[-1]["skipped"])
    rows["device"] = f"{environment['world_size']} rank(s) on {environment['device']}"
    rows["commit"] = str(environment["commit"])
    rows["checkpoint"] = str(folder / "checkpoints" / "latest")
    return rows


def _probe_section(folder: Path) -> str:
    """The probe's curve, and its last measurements language by language."""
    probe = read_probe(folder)
    if not probe:
        return ""
    last = max(probe)
    rows = [_row("language", PROBE)]
    for language, measured in sorted(probe[last].items()):
        rows.append(
            _row(language or "mean, English aside", [f"{measured[name]:.4f}" for name in PROBE])
        )
    heading = f"<h2>Cross-lingual probe, step {last}</h2>"
    return f"{heading}{_image(plot_probe(folder), 'probe curve')}<table>{''.join(rows)}</table>"


def _row(name: str, values: Iterable[str]) -> str:
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
    return f"<tr><th>{html.escape(name)}</th>{cells}</tr>"


def _image(path: Path, title: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"<img src='data:image/png;base64,{content}' alt='{title}'>"


def plot_probe(folder: Path) -> Path:
    """The probe's means by step, and each language's, thin, as probe.png."""
    from matplotlib.figure import Figure

    probe = read_probe(folder)
    steps = sorted(probe)
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots(1, len(PROBE))
    for axis, name in zip(axes, PROBE):
        for language in probe[steps[-1]]:
            style = (
                {"lw": 0.7, "alpha": 0.5}
                if language
                else {"lw": 2, "marker": "o", "color": "black"}
            )
            values = [probe[step].get(language, {}).get(name, math.nan) for step in steps]
            axis.plot(steps, values, **style)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    path = folder / "probe.png"
    figure.savefig(path, dpi=120)
    return path


def plot_curve(folder: Path) -> Path:
    """FVU or accuracy by step, training (per step) and held-out, as curve.png."""
    from matplotlib.figure import Figure

    training, validation = read_metrics(folder)
    name = next(name for name in LABELS if name in training[-1])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(
        [r["step"] for r in training],
        [r[name] for r in training],
        lw=1,
        alpha=0.6,
        label="training batch",
    )
    if validation:
        steps, values = zip(*((row["step"], row[f"validation_{name}"]) for row in validation))
        axis.plot(steps, values, "o-", lw=2, label="held-out")
        axis.annotate(
            f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(4, 6), textcoords="offset points"
        )
    if name == "fvu":
        axis.axhline(1.0, color="grey", ls="--", lw=1, label="predicting the mean")
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=Y_LABELS[name], title=str(folder))
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    path = folder / "curve.png"
    figure.savefig(path, dpi=120)
    return path
