"""A run on one page: report.html with its curve and its numbers."""

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtllm_engine.languages import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"fvu": "FVU", "accuracy": "accuracy"}  # as tables call them
PROBE = ("fvu", "cosine", "retrieval")
MEAN = "mean, English aside"
NARROW_PX = 640  # a window up to so wide gets pictures made for phones
DASHES = ("-", "--", "-.", ":")
STYLE = (
    "body{font:16px/1.4 sans-serif;max-width:60em;margin:1em auto;padding:0 1em}"
    "h1{overflow-wrap:anywhere}img{max-width:100%;height:auto}"
    "table{border-collapse:collapse}th{text-align:left;font-weight:600;padding-right:1.5em}"
    "th,td{vertical-align:top;padding-top:.15em;padding-bottom:.15em}td{overflow-wrap:anywhere}"
    ".numbers td,.numbers th+th{text-align:right;padding-left:1em;white-space:nowrap;"
    "font-variant-numeric:tabular-nums}"
    ".numbers th+th{padding-right:0}"
    "pre{overflow-x:auto;font-size:14px;background:#f4f4f4;padding:.7em}"
    f"@media(max-width:{NARROW_PX}px){{body{{font-size:15px}}th{{padding-right:.8em}}"
    ".numbers td,.numbers th+th{padding-left:.5em}}"
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
    title, curve = html.escape(folder.name), _picture(plot_curve, folder, "training curve")
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{curve}"
        f"<table>{cells}</table>{_probe_section(folder)}"
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
    words = (
        "Foreign lines, read by the stack, against the same lines in English, read by the LLM: fvu"
        " and cosine are of their states; retrieval is the share of lines whose own English line is"
        " the nearest of all."
    )
    heads = "".join(f"<th>{name}</th>" for name in ("language", *PROBE))
    rows = [f"<tr>{heads}</tr>"]
    for language in sorted(probe[last], key=lambda code: (code != "", language_label(code))):
        measured = [f"{probe[last][language][name]:.4f}" for name in PROBE]
        rows.append(_row(language_label(language), measured))
    curves = _picture(plot_probe, folder, "probe curves, a line for each language")
    table = f"<table class=numbers>{''.join(rows)}</table>"
    return f"<h2>Cross-lingual probe, step {last}</h2><p>{words}</p>{curves}{table}"


def language_label(code: str) -> str:
    """A language's name and code, as a reader knows it; "" is the mean."""
    if not code:
        return MEAN
    return f"{NAMES[code]} ({code})" if code in NAMES else code


def _row(name: str, values: Iterable[str]) -> str:
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
    return f"<tr><th>{html.escape(name)}</th>{cells}</tr>"


def _picture(plot: Callable[..., Path], folder: Path, title: str) -> str:
    """What `plot` draws, as the page shows it: in a window as narrow as a phone's drawn for it."""
    narrow, wide = io.BytesIO(), plot(folder).read_bytes()
    plot(folder, narrow)
    sources = [base64.b64encode(each).decode() for each in (narrow.getvalue(), wide)]
    small, large = (f"data:image/png;base64,{source}" for source in sources)
    return (
        f"<picture><source media='(max-width:{NARROW_PX}px)' srcset='{small}'>"
        f"<img src='{large}' alt='{title}'></picture>"
    )


def plot_probe(folder: Path, narrow: io.BytesIO | None = None) -> Path:
    """The probe's means by step, and each language's, thin, with a legend, as probe.png.

    Args:
        narrow: It is drawn for a phone, into this instead of the file.
    """
    probe = read_probe(folder)
    steps = sorted(probe)
    languages = sorted(filter(None, probe[steps[-1]]), key=language_label)
    columns, width, height = (1, 4.2, 7.5) if narrow else (3, 10.0, 3.3)
    rows = math.ceil((len(languages) + 1) / columns)
    legend = 0.22 * rows + 0.2  # inches
    figure = _figure(width, height + legend)
    drawing, below = figure.subfigures(2, 1, height_ratios=(height, legend))
    styles = [{"color": f"C{colour}", "ls": dash} for dash in DASHES for colour in range(10)]
    axes = drawing.subplots(len(PROBE) // columns, columns)
    for axis, name in zip(axes, PROBE):
        for language, style in zip(languages, itertools.cycle(styles)):
            values = [probe[step].get(language, {}).get(name, math.nan) for step in steps]
            axis.plot(steps, values, label=language_label(language), lw=1.2, **style)
        mean = [probe[step].get("", {}).get(name, math.nan) for step in steps]
        axis.plot(steps, mean, "o-", color="black", lw=2, label=MEAN)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    below.legend(*axes[0].get_legend_handles_labels(), loc="center", ncols=columns, frameon=False)
    return _save(figure, folder / "probe.png", narrow)


def plot_curve(folder: Path, narrow: io.BytesIO | None = None) -> Path:
    """FVU or accuracy by step, training (per step) and held-out, as curve.png.

    Args:
        narrow: As for `plot_probe`.
    """
    training, validation = read_metrics(folder)
    name = next(name for name in LABELS if name in training[-1])
    figure = _figure(*((4.2, 3.6) if narrow else (10.0, 4.5)))
    axis = figure.subplots()
    steps = [row["step"] for row in training]
    axis.plot(steps, [row[name] for row in training], lw=1, alpha=0.6, label="training batch")
    if validation:
        steps, values = zip(*((row["step"], row[f"validation_{name}"]) for row in validation))
        axis.plot(steps, values, "o-", lw=2, label="held-out")
        offset = {"xytext": (0, 7), "textcoords": "offset points", "ha": "right"}
        axis.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), **offset)
    if name == "fvu":
        axis.axhline(1.0, color="grey", ls="--", lw=1, label="predicting the mean")
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=Y_LABELS[name], title=folder.name)
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    return _save(figure, folder / "curve.png", narrow)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path, narrow: io.BytesIO | None) -> Path:
    """Of a narrow one twice the pixels of the screen's points, as phones have."""
    figure.savefig(narrow or path, dpi=200 if narrow else 120, format="png")
    return path
