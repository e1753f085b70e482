"""A run on one page: report.html with its curve and its numbers."""

import base64
import html
import json
from pathlib import Path
from typing import Any

MEASURES = {"fvu": "FVU", "accuracy": "accuracy"}  # as tables call them
Y_LABELS = {"fvu": "fraction of variance unexplained", "accuracy": "accuracy"}


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training rows and the validation rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "validation_documents" in row]


def write_report(folder: Path) -> Path:
    """Writes curve.png and report.html into a run's folder; returns the latter's path."""
    curve = plot_curve(folder)
    image = base64.b64encode(curve.read_bytes()).decode()
    rows = [(html.escape(key), html.escape(value)) for key, value in summary(folder).items()]
    cells = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows)
    settings = html.escape((folder / "config.toml").read_text())
    page = folder / "report.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}th{text-align:left;padding-right:2em}"
        "img{max-width:100%}</style>"
        f"<h1>{html.escape(folder.name)}</h1><img src='data:image/png;base64,{image}' alt='training curve'>"
        f"<table>{cells}</table><h2>Configuration</h2><pre>{settings}</pre>"
    )
    return page


def summary(folder: Path) -> dict[str, str]:
    """What a run came to, as names and values."""
    training, validation = read_metrics(folder)
    environment = json.loads((folder / "environment.json").read_text())
    steady = training[len(training) // 4 :]  # the first steps warm caches and compile
    rates = sorted(row["pairs_per_s"] for row in steady)
    rows = {"steps": str(training[-1]["step"])}
    for name, label in MEASURES.items():
        values = [row[f"validation_{name}"] for row in validation if f"validation_{name}" in row]
        if values:
            rows[f"held-out {label} before"], rows[f"held-out {label} after"] = f"{values[0]:.4f}", f"{values[-1]:.4f}"
    if validation:
        rows["held-out documents"] = f"{validation[-1]['validation_documents']}"
    rows["loss, last step"] = f"{training[-1]['loss']:.6f}"
    rows["pair tokens/s, median"] = f"{rates[len(rates) // 2]:,.0f}"
    rows["documents skipped"] = str(training[-1]["skipped"])
    rows["device"] = f"{environment['world_size']} rank(s) on {environment['device']}"
    rows["commit"] = str(environment["commit"])
    rows["checkpoint"] = str(folder / "checkpoints" / "latest")
    return rows


def plot_curve(folder: Path) -> Path:
    """FVU or accuracy by step, training (per step) and held-out, as curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training, validation = read_metrics(folder)
    name = next(name for name in MEASURES if name in training[-1])
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot([r["step"] for r in training], [r[name] for r in training], lw=1, alpha=0.6, label="training batch")
    if validation:
        steps, values = zip(*((row["step"], row[f"validation_{name}"]) for row in validation))
        axis.plot(steps, values, "o-", lw=2, label="held-out")
        axis.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(4, 6), textcoords="offset points")
    if name == "fvu":
        axis.axhline(1.0, color="grey", ls="--", lw=1, label="predicting the mean")
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=Y_LABELS[name], title=str(folder))
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    path = folder / "curve.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
