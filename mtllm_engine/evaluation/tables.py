"""Result tables and how they are shown: CSV, Markdown, and a picture."""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtllm_engine.evaluation.bootstrap import Comparison, Score, Table, compare, summarise
from mtllm_engine.evaluation.predictions import COSTS, TRANSLATION_COUNTS, load
from mtllm_engine.evaluation.provenance import commits, sort_out
from mtllm_engine.files import write_text

MARKS = {"fallback": "*", "unknown": "†"}
COST_TITLES = {
    "latency_s": "s for 1,000 examples",
    "gpu_hours": "GPU-hours to make",
    "flops": "FLOPs to make",
}
TRANSLATED_BY = {
    "sentences": "translated sentence by sentence",
    "lines": "translated line by line, where a translator leaves out what comes late in a long one",
}
ROW_INCHES, PANEL_ROWS, PANEL_INCHES = 0.26, 45, 5.2
MARKERS = "osD^vPX*<>"


def write(
    folder: Path | str, *, baseline: str | None = None, resamples: int = 1000, seed: int = 0
) -> Path:
    """Writes results.csv, .json, .md and a picture for each table (results-DATASET-MEASURE.png)
    beside the predictions.

    Args:
        baseline: A system that every other one is compared with, paired; None compares none.

    Returns:
        The path of results.md.
    """
    folder = Path(folder)
    damaged: list[str] = []  # of what was not asked for: what was has been made anew
    predictions, left_out = sort_out(load(folder, damaged))
    options = {"resamples": resamples, "seed": seed}
    tables = summarise(predictions, **options)
    if baseline in {each.system for each in left_out} - {item.system for item in predictions}:
        baseline = None
    others = sorted({item.system for item in predictions} - {baseline}) if baseline else []
    pairs = [compare(predictions, system, baseline, **options) for system in others]
    comparisons = list(itertools.chain(*pairs))
    content = {"tables": list(map(asdict, tables)), "comparisons": list(map(_as_dict, comparisons))}
    content |= {"left_out": list(map(asdict, left_out)), "commits": commits(predictions)}
    content |= {"damaged": damaged}
    write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "results.csv", csv_text(tables))
    notes = [*map(str, left_out), *(f"Left out: {each}" for each in damaged)]
    notes += _commit_notes(commits(predictions))
    write_text(folder / "results.md", markdown(tables, comparisons, resamples, notes))
    for table in tables:
        plot(table, folder / f"results-{table.dataset}-{table.measure}.png")
    return folder / "results.md"


def csv_text(tables: Sequence[Table]) -> str:
    """A line for each dataset, measure and language or average, values from 0 to 1."""
    systems = sorted({system for table in tables for system in table.scores})
    kinds = {"": "value", " low": "low", " high": "high", " sd": "sd"}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [system + kind for system in systems for kind in kinds]
    counted = [system for system in systems if any(system in table.translated for table in tables)]
    names += [f"{system} {name}" for system in counted for name in TRANSLATION_COUNTS]
    writer.writerow(["dataset", "measure", "language", "status", "given", "languages", *names])
    for table in tables:
        for row in [*table.languages, *table.averaged]:
            scores = [table.scores.get(system, {}).get(row) for system in systems]
            values = [getattr(score, name, None) for score in scores for name in kinds.values()]
            cells = ["" if value is None else f"{value:.6f}" for value in values]
            counts = [table.translated.get(system, {}).get(row, {}) for system in counted]
            cells += [str(each.get(name, "")) for each in counts for name in TRANSLATION_COUNTS]
            count = len(table.averaged.get(row, [row]))
            encoded = (table.languages.get(row) or "", table.given.get(row, ""))
            writer.writerow([table.dataset, table.measure, row, *encoded, count, *cells])
    return text.getvalue()


def markdown(
    tables: Sequence[Table],
    comparisons: Sequence[Comparison],
    resamples: int,
    notes: Sequence[str] = (),
) -> str:
    """All tables, values in percent, after what is to be said of all."""
    interval = f"[95 % bootstrap interval, {resamples} resamples]"
    note = f"Values in percent, {interval}, ± standard deviation over seeds."
    marks = "A language marked * is given to an encoder by a fallback code; "
    marks += "† has an encoder that has no token for it, or was not trained on it."
    sections = [*map(_table_section, tables), *map(_comparison_section, comparisons)]
    return "\n\n".join(["# Results", note, marks, *notes, *sections]) + "\n"


def _commit_notes(makers: Mapping[str, Sequence[str]]) -> list[str]:
    """That more than one version of our code made what is in the tables."""
    parts = [f"{commit} ({'; '.join(systems)})" for commit, systems in makers.items()]
    return [f"Evaluated with different commits: {', '.join(parts)}"] if len(parts) > 1 else []


def plot(table: Table, path: Path) -> None:
    """A picture: each system's values with their intervals, averages on top, the best language
    first."""
    from matplotlib.figure import Figure

    panels = _panels([*table.averaged, *_ranked(table)])
    height = max(2.0, ROW_INCHES * len(panels[0]) + 1.3)
    size = (max(6.5, PANEL_INCHES * len(panels)), height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)
    for axis, rows in zip(axes[0], panels):
        _plot_panel(axis, table, rows, len(panels[0]))
    handles, labels = axes[0][0].get_legend_handles_labels()
    ncols = min(len(labels), 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    title = f"{table.dataset}: {table.measure.replace('_', ' ')} in percent, 95 % intervals"
    if set(table.languages.values()) & set(MARKS):
        title += "\n* fallback code, † language that the encoder does not know"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def plot_compute(points: Sequence[Mapping[str, object]], path: Path) -> None:
    """Quality against what it took to make, over settings: PATH.csv, PATH.md and PATH.png, a panel
    for each measure.

    Args:
        points: setting, dataset, measure, system, value, low, high, and COSTS, the same keys in
            each.
    """
    from matplotlib.figure import Figure

    text = io.StringIO()
    writer = csv.DictWriter(text, list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    write_text(path.with_suffix(".csv"), text.getvalue())
    write_text(path.with_suffix(".md"), _compute_table(points))
    panels = list(dict.fromkeys((point["dataset"], point["measure"]) for point in points))
    size = (8, 4.5 * len(panels) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (dataset, measure) in zip(axes[:, 0], panels):
        panel = {"dataset": dataset, "measure": measure}
        _plot_compute_panel(axis, [point for point in points if panel.items() <= point.items()])
        axis.set_title(f"{dataset}: {measure.replace('_', ' ')}, 95 % intervals", fontsize=11)
    entries = axes[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def _compute_table(points: Sequence[Mapping[str, object]]) -> str:
    names = ("setting", "dataset", "measure", "system")
    columns = [*names, "average", *(COST_TITLES[name] for name in COSTS)]
    lines = [_line(columns), _line(["---"] * 4 + ["--:"] * 4)]
    for point in points:
        costs = [_cost_cell(point[name]) for name in COSTS]
        average = _cell(Score(**{name: point[name] for name in ("value", "low", "high")}))
        lines.append(_line([*(str(point[name]) for name in names), average, *costs]))
    return "\n".join(lines) + "\n"


def _plot_compute_panel(axis, points: Sequence[Mapping[str, object]]) -> None:
    """A point for each system and setting, but those whose cost is not known."""
    # Each system's points, in its own marker.
    for index, system in enumerate(sorted({point["system"] for point in points})):
        mine = [point for point in points if point["system"] == system]
        costs = [float("nan") if point["flops"] is None else point["flops"] for point in mine]
        values, lows, highs = (
            [100 * point[name] for point in mine] for name in ("value", "low", "high")
        )
        lengths = _error_lengths(values, lows, highs)
        style = {"fmt": MARKERS[index % len(MARKERS)], "capsize": 3, "alpha": 0.8}
        axis.errorbar(costs, values, lengths, label=system, **style)
    axis.set(xlabel=COST_TITLES["flops"], ylabel="average over foreign languages, percent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    # A label for each point, above those of the same cost, on the side where there is room.
    bottom, top = axis.get_ylim()
    free: dict[float, float] = {}  # cost -> from where on no label stands yet
    for (cost, value), text in sorted(_labels(points).items()):
        height = 0.03 * (top - bottom) * (1 + text.count("\n"))
        foot = max(100 * value - height / 2, free.get(cost, bottom))
        free[cost] = foot + height
        side, gap = ("left", 6) if cost < axis.get_xlim()[1] / 2 else ("right", -6)
        style = {"xytext": (gap, 0), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axis.annotate(text, (cost, foot), fontsize=7, **style)


def _labels(points: Sequence[Mapping[str, object]]) -> dict[tuple[float, float], str]:
    """(cost, value) -> the settings that have it: all, of a system that settings leave alone."""
    settings = list(dict.fromkeys(point["setting"] for point in points))
    shared: dict[tuple[float, float], list[str]] = {}
    for point in points:
        if point["flops"] is not None:
            shared.setdefault((point["flops"], point["value"]), []).append(point["setting"])
    labels = {}
    for point, names in shared.items():
        distinct = list(dict.fromkeys(names))
        are_all = distinct == settings and len(settings) > 1
        labels[point] = "all settings" if are_all else "\n".join(distinct)
    return labels


def _plot_panel(axis, table: Table, rows: Sequence[str], num_rows: int) -> None:
    """Rows from top to bottom, each with the systems one below the other."""
    # Each system's row is a little below the one before it.
    step = 0.6 / len(table.scores)
    for index, (system, scores) in enumerate(table.scores.items()):
        offset = (index - (len(table.scores) - 1) / 2) * step
        heights = [height + offset for height, row in enumerate(rows) if row in scores]
        values, lows, highs = (
            [100 * getattr(scores[row], name) for row in rows if row in scores]
            for name in ("value", "low", "high")
        )
        lengths = _error_lengths(values, lows, highs)
        style = {"fmt": MARKERS[index % len(MARKERS)], "ms": 4, "lw": 1, "color": f"C{index}"}
        axis.errorbar(values, heights, xerr=lengths, label=system, **style)
    # What makes the rows readable: every other one shaded, what guessing comes to, names.
    for height in range(0, len(rows), 2):
        axis.axhspan(height - 0.5, height + 0.5, color="0.95", zorder=0)
    if table.chance is not None:
        axis.axvline(100 * table.chance, color="grey", ls="--", lw=1, label="guessing")
    axis.set_yticks(range(len(rows)), [_label(table, row) for row in rows], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows):
        label.set_fontweight("bold" if row in table.averaged else "normal")
    axis.set_ylim(num_rows - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _error_lengths(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> list[list[float]]:
    """Below and above each value.

    An interval of resampled values need not hold the value itself; matplotlib takes no negative
    lengths.
    """
    below = [max(0.0, value - low) for value, low in zip(values, lows)]
    return [below, [max(0.0, high - value) for value, high in zip(values, highs)]]


def _panels(rows: Sequence[str]) -> list[Sequence[str]]:
    """Rows in columns of at most PANEL_ROWS, as equally long as can be."""
    count = -(-len(rows) // PANEL_ROWS)
    length = -(-len(rows) // count)
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _ranked(table: Table) -> list[str]:
    """Languages by the mean over their systems, the best first, but those that no system could
    read."""

    def mean(language: str) -> float:
        values = [scores[language].value for scores in table.scores.values() if language in scores]
        return sum(values) / len(values)

    read = set(table.languages) & set().union(*table.scores.values())
    return sorted(read, key=lambda language: (-mean(language), language))


def _label(table: Table, row: str) -> str:
    if row in table.averaged:
        return f"{row} ({len(table.averaged[row])})"
    return row + MARKS.get(table.languages[row] or "", "")


def _table_section(table: Table) -> str:
    systems = list(table.scores)
    title = f"{table.dataset}, {table.measure}"
    lines = [_line([title, *systems]), _line(["---"] + ["--:"] * len(systems))]
    for row in [*table.languages, *table.averaged]:
        cells = [_cell(table.scores[system].get(row)) for system in systems]
        lines.append(_line([_label(table, row), *cells]))
    for name in COSTS:
        values = [table.costs[system][name] for system in systems]
        if any(value is not None for value in values):
            lines.append(_line([COST_TITLES[name], *map(_cost_cell, values)]))
    return "\n\n".join(["\n".join(lines), *_notes(table)])


def _notes(table: Table) -> Iterator[str]:
    """What encoders got for languages that they lack, and how translating went."""
    for language, status in table.languages.items():
        if table.given[language] not in ("", language):
            yield f"* {language} was given to the encoder as {table.given[language]}"
        if status == "unknown":
            yield f"† {language} {_unknown(language, table.given[language])}"
    for system, languages in table.translated.items():
        if system in table.translated_by:
            yield f"{system}: {TRANSLATED_BY[table.translated_by[system]]}"
        flawed = {
            name: each for name, each in languages.items() if each["cut"] + each["unfinished"]
        }
        for language, counts in flawed.items():
            yield f"{system} in {language}: {translation_counts(counts)}"
        if not flawed:
            yield f"{system}: every text was translated whole, to an end"


def _unknown(language: str, given: str) -> str:
    """Args: given: What encoders got for it."""
    if language in given.split(" and "):
        return "was read by an encoder that was not trained on it"
    return "was not given to an encoder, which has no token for it"


def translation_counts(counts: Mapping[str, int]) -> str:
    """In words. Args: counts: As `Predictions.translation_counts`."""
    whole = "segments" if "segments" in counts else "examples"  # as older predictions have it
    ends = {"segments": "_segments", "examples": ""}
    cut, unfinished = (counts[name + ends[whole]] for name in ("cut", "unfinished"))
    positions = f"{cut} cut at the translator's positions"
    text = f"of {counts[whole]} {whole} {positions}, {unfinished} translated without an end"
    if whole == "segments":
        text += f"; they are in {counts['cut']} and {counts['unfinished']} "
        text += f"of {counts['examples']} examples"
    return text


def _comparison_section(comparison: Comparison) -> str:
    title = f"{comparison.dataset}, {comparison.measure}: {comparison.ours} - {comparison.theirs}"
    lines = [_line([title, "difference", "interval excludes 0"]), _line(["---", "--:", "---"])]
    for row, score in comparison.scores.items():
        lines.append(_line([row, _cell(score), "yes" if score.excludes_zero else "no"]))
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    spread = "" if score.sd is None else f" ± {100 * score.sd:.1f}"
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]{spread}"


def _cost_cell(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    excluding = [name for name, score in comparison.scores.items() if score.excludes_zero]
    return asdict(comparison) | {"excludes_zero": excluding}
