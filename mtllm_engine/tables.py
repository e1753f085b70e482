"""Result tables and how they are shown: CSV, Markdown, and a picture."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STATUSES = ("known", "fallback", "unknown")  # from best to worst: has a system's encoder the language
COSTS = ("latency_s", "gpu_hours", "flops")
AVERAGE, KNOWN = "average", "average, known"
MARKS = {"fallback": "*", "unknown": "†"}
COST_TITLES = {"latency_s": "s for 1,000 examples", "gpu_hours": "GPU-hours to make", "flops": "FLOPs to make"}
ROW_INCHES, PANEL_ROWS, PANEL_INCHES = 0.26, 45, 5.2
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A value from 0 to 1 (or a difference of two) with its interval, and its standard deviation over seeds if any."""

    value: float
    low: float
    high: float
    sd: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """One measure on one dataset. Averages are over the languages for which every system has predictions."""

    dataset: str
    measure: str
    languages: Mapping[str, str | None]  # with the worst status that a system reports
    given: Mapping[str, str]  # language -> the one whose token encoders got; "" for none
    averaged: Mapping[str, Sequence[str]]  # AVERAGE and KNOWN (every system's encoder has it) -> their languages
    scores: Mapping[str, Mapping[str, Score]]  # system -> language or average -> score
    costs: Mapping[str, Mapping[str, float | None]]  # system -> COSTS, means over its files
    chance: float | None  # accuracy of guessing


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paired difference ours - theirs of one measure on one dataset, on the same examples."""

    dataset: str
    measure: str
    ours: str
    theirs: str
    scores: Mapping[str, Score]  # language or average -> difference


def csv_text(tables: Sequence[Table]) -> str:
    """A line for each dataset, measure and language or average; four columns a system, values from 0 to 1."""
    systems = sorted({system for table in tables for system in table.scores})
    kinds = {"": "value", " low": "low", " high": "high", " sd": "sd"}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [system + kind for system in systems for kind in kinds]
    writer.writerow(["dataset", "measure", "language", "status", "given", "languages", *names])
    for table in tables:
        for row in [*table.languages, *table.averaged]:
            scores = [table.scores.get(system, {}).get(row) for system in systems]
            found = [getattr(score, name, None) for score in scores for name in kinds.values()]
            cells = ["" if value is None else f"{value:.6f}" for value in found]
            count = len(table.averaged.get(row, [row]))
            encoded = (table.languages.get(row) or "", table.given.get(row, ""))
            writer.writerow([table.dataset, table.measure, row, *encoded, count, *cells])
    return text.getvalue()


def markdown(tables: Sequence[Table], comparisons: Sequence[Comparison], resamples: int) -> str:
    """All tables, values in percent."""
    note = f"Values in percent, [95 % bootstrap interval, {resamples} resamples], ± standard deviation over seeds."
    marks = "A language marked * is given to an encoder by a fallback code; † has an encoder without it."
    sections = [*map(_table_section, tables), *map(_comparison_section, comparisons)]
    return "\n\n".join(["# Results", note, marks, *sections]) + "\n"


def plot(table: Table, path: Path) -> None:
    """Writes a picture: a dot with its interval for each system, languages from best to worst, averages on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels([*table.averaged, *_ranked(table)])
    height = max(2.0, ROW_INCHES * len(panels[0]) + 1.3)
    size = (max(6.5, PANEL_INCHES * len(panels)), height)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", sharex=True, squeeze=False)
    for axis, rows in zip(axes[0], panels):
        _plot_panel(axis, table, rows, len(panels[0]))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    title = f"{table.dataset}: {table.measure.replace('_', ' ')} in percent, 95 % intervals"
    if set(table.languages.values()) & set(MARKS):
        title += "\n* fallback code, † encoder without the language"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_compute(points: Sequence[Mapping[str, object]], path: Path) -> None:
    """Quality against what it took to make, over settings: PATH.csv, PATH.md and PATH.png, a panel for each measure.

    Args:
        points: setting, dataset, measure, system, value, low, high, and COSTS, the same keys in each.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(points[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)
    path.with_suffix(".md").write_text(_compute_table(points), encoding="utf-8")
    panels = list(dict.fromkeys((point["dataset"], point["measure"]) for point in points))
    size = (8, 4.5 * len(panels) + 0.5)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, (dataset, measure) in zip(axes[:, 0], panels):
        mine = [point for point in points if (point["dataset"], point["measure"]) == (dataset, measure)]
        _plot_compute_panel(axis, mine)
        axis.set_title(f"{dataset}: {measure.replace('_', ' ')}, 95 % intervals", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def _compute_table(points: Sequence[Mapping[str, object]]) -> str:
    columns = ["setting", "dataset", "measure", "system", "average", *(COST_TITLES[name] for name in COSTS)]
    lines = [_line(columns), _line(["---"] * 4 + ["--:"] * 4)]
    for point in points:
        costs = ["-" if point[name] is None else f"{point[name]:.4g}" for name in COSTS]
        average = f"{100 * point['value']:.1f} [{100 * point['low']:.1f}, {100 * point['high']:.1f}]"
        lines.append(_line([*(str(point[name]) for name in columns[:4]), average, *costs]))
    return "\n".join(lines) + "\n"


def _plot_compute_panel(axis, points: Sequence[Mapping[str, object]]) -> None:
    """A point for each system and setting; one whose cost is not known has no place."""
    for index, system in enumerate(sorted({point["system"] for point in points})):
        mine = [point for point in points if point["system"] == system]
        costs = [float("nan") if point["flops"] is None else point["flops"] for point in mine]
        values, lows, highs = ([100 * point[name] for point in mine] for name in ("value", "low", "high"))
        errors = _error_lengths(values, lows, highs)
        axis.errorbar(costs, values, errors, fmt=MARKERS[index % len(MARKERS)], capsize=3, label=system, alpha=0.8)
    axis.set(xlabel=COST_TITLES["flops"], ylabel="average over foreign languages, percent")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    bottom, top = axis.get_ylim()
    free: dict[float, float] = {}  # cost -> from where on no label stands yet
    for (cost, value), text in sorted(_place_labels(points).items()):
        height = 0.03 * (top - bottom) * (1 + text.count("\n"))
        foot = max(100 * value - height / 2, free.get(cost, bottom))
        free[cost] = foot + height
        is_left = cost < axis.get_xlim()[1] / 2  # its label is then on its right, where there is room
        place = {"xytext": (6 if is_left else -6, 0), "ha": "left" if is_left else "right", "va": "bottom"}
        axis.annotate(text, (cost, foot), textcoords="offset points", fontsize=7, **place)


def _place_labels(points: Sequence[Mapping[str, object]]) -> dict[tuple[float, float], str]:
    """The settings at each place that has a point: a system that settings leave alone has one for all of them."""
    settings = list(dict.fromkeys(point["setting"] for point in points))
    places: dict[tuple[float, float], list[str]] = {}
    for point in points:
        if point["flops"] is not None:
            places.setdefault((point["flops"], point["value"]), []).append(point["setting"])
    labels = {place: list(dict.fromkeys(names)) for place, names in places.items()}
    return {
        place: "all settings" if names == settings and len(names) > 1 else "\n".join(names)
        for place, names in labels.items()
    }


def _plot_panel(axis, table: Table, rows: Sequence[str], num_rows: int) -> None:
    """Rows from top to bottom, each with the systems one below the other."""
    step = 0.6 / len(table.scores)
    for index, (system, scores) in enumerate(table.scores.items()):
        offset = (index - (len(table.scores) - 1) / 2) * step
        points = [(place + offset, scores[row]) for place, row in enumerate(rows) if row in scores]
        values = [100 * score.value for _, score in points]
        lows, highs = ([100 * getattr(score, name) for _, score in points] for name in ("low", "high"))
        errors = _error_lengths(values, lows, highs)
        places = [place for place, _ in points]
        marker = MARKERS[index % len(MARKERS)]
        axis.errorbar(values, places, xerr=errors, fmt=marker, ms=4, lw=1, color=f"C{index}", label=system)
    for place in range(0, len(rows), 2):
        axis.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
    if table.chance is not None:
        axis.axvline(100 * table.chance, color="grey", ls="--", lw=1, label="guessing")
    axis.set_yticks(range(len(rows)), [_label(table, row) for row in rows], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows):
        label.set_fontweight("bold" if row in table.averaged else "normal")
    axis.set_ylim(num_rows - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _error_lengths(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Below and above each value.

    An interval of resampled values need not hold the value itself; matplotlib takes no negative lengths.
    """
    below = [max(0.0, value - low) for value, low in zip(values, lows)]
    return [below, [max(0.0, high - value) for value, high in zip(values, highs)]]


def _panels(rows: Sequence[str]) -> list[Sequence[str]]:
    """Rows in columns of at most PANEL_ROWS, as equally long as can be."""
    count = -(-len(rows) // PANEL_ROWS)
    length = -(-len(rows) // count)
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _ranked(table: Table) -> list[str]:
    """Languages by the mean over their systems, the best first; those that no system could read are left out."""

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
    lines = [_line([f"{table.dataset}, {table.measure}", *systems]), _line(["---"] + ["--:"] * len(systems))]
    for row in [*table.languages, *table.averaged]:
        lines.append(_line([_label(table, row), *(_cell(table.scores[system].get(row)) for system in systems)]))
    for name in COSTS:
        values = [table.costs[system][name] for system in systems]
        if any(value is not None for value in values):
            lines.append(_line([COST_TITLES[name], *("-" if value is None else f"{value:.4g}" for value in values)]))
    return "\n\n".join(["\n".join(lines), *_notes(table)])


def _notes(table: Table) -> Iterator[str]:
    """What encoders got for languages that they lack."""
    for language, status in table.languages.items():
        if table.given[language] not in ("", language):
            yield f"* {language} was given to the encoder as {table.given[language]}"
        if status == "unknown":
            yield f"† {language} was not given to an encoder, which has no token for it"


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


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
