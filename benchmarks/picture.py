"""The README's picture: teacher and student over one LLM.

python -m benchmarks.picture [--out FILE.svg]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).resolve().with_suffix(".svg")
INK, GREY = "#1f2933", "#52606d"
PANEL, FROZEN, TRAINED, STATE = "#ffffff", "#d9e8f6", "#ffd9a8", "#e4e7eb"
TOP, BOTTOM = 2.95, 1.05  # where the teacher's and the student's rows are
HEIGHT = 0.86


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws it into a file, beside this one unless told otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    # Text as outlines and no date: one file, whatever fonts a reader has and whenever it is made.
    settings = {"svg.fonttype": "path", "svg.hashsalt": "mtllm", "font.family": "DejaVu Sans"}
    with pyplot.rc_context(settings):
        figure = draw()
    out = parser.parse_args(arguments).out
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    with pyplot.rc_context(settings):
        figure.savefig(out, metadata=metadata, transparent=True, dpi=110)
    pyplot.close(figure)
    return 0


def draw() -> Any:
    """The figure: a light panel, which white and dark pages both show."""
    figure, axes = pyplot.subplots(figsize=(9.4, 3.6))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 12.6), ylim=(0, 4.83))
    axes.axis("off")
    _box(axes, 0.1, 0.1, 12.4, 4.63, color=PANEL, edge="#cbd2d9", rounding=0.2)
    # One LLM reads both rows, so one tall box.
    _box(axes, 7.05, BOTTOM - 0.72, 2.0, TOP - BOTTOM + 1.44, "", FROZEN)
    _text(axes, 8.05, TOP, "LLM", weight="bold")
    _text(axes, 8.05, (TOP + BOTTOM) / 2, "one copy of the\nweights for both", color=GREY, size=8.5)
    _box(axes, 7.3, BOTTOM - HEIGHT / 2, 1.5, HEIGHT, "adapters", TRAINED, weight="bold")
    _row(axes, TOP, "teacher", "an English text")
    _row(axes, BOTTOM, "student", "the same text;\nlater any language")
    _arrow(axes, (2.2, TOP), (7.05, TOP))
    _box(axes, 3.1, BOTTOM - HEIGHT / 2, 1.75, HEIGHT, "multilingual\nencoder", FROZEN, "bold")
    _box(axes, 5.25, BOTTOM - HEIGHT / 2, 1.35, HEIGHT, "projection", TRAINED, "bold")
    for start, end in ((2.65, 3.1), (4.85, 5.25), (6.6, 7.3)):
        _arrow(axes, (start, BOTTOM), (end, BOTTOM))
    for y, state in ((TOP, "mean\nstate t"), (BOTTOM, "mean\nstate s")):
        _arrow(axes, (9.05 if y == TOP else 8.8, y), (9.6, y))
        _box(axes, 9.6, y - HEIGHT / 2, 1.05, HEIGHT, state, STATE)
    _arrow(axes, (10.65, TOP), (11.55, (TOP + BOTTOM) / 2 + 0.3), bend=-0.25)
    _arrow(axes, (10.65, BOTTOM), (11.55, (TOP + BOTTOM) / 2 - 0.3), bend=0.25)
    _text(axes, 11.5, (TOP + BOTTOM) / 2, "loss\n‖s − t‖²", weight="bold")
    _legend(axes)
    return figure


def _row(axes: Axes, y: float, name: str, text: str) -> None:
    _text(axes, 0.4, y + 0.4, name, align="left", weight="bold", size=11)
    _text(axes, 0.4, y - 0.06 - 0.17 * text.count("\n"), text, align="left", color=GREY)


def _legend(axes: Axes) -> None:
    for x, color, name in ((0.4, FROZEN, "frozen"), (1.75, TRAINED, "trained")):
        _box(axes, x, 4.2, 0.28, 0.28, color=color)
        _text(axes, x + 0.4, 4.33, name, align="left", color=GREY)
    _text(axes, 12.2, 4.33, "trained on English text alone", align="right", color=GREY)


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    color: str = PANEL,
    weight: str = "normal",
    *,
    edge: str = INK,
    rounding: float = 0.08,
) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    options = {"boxstyle": style, "facecolor": color, "edgecolor": edge, "linewidth": 1.0}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **options))
    _text(axes, x + width / 2, y + height / 2, text, weight=weight)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    align: str = "center",
    color: str = INK,
    weight: str = "normal",
    size: float = 9.5,
) -> None:
    options = {"ha": align, "va": "center", "color": color, "weight": weight, "size": size}
    axes.text(x, y, text, linespacing=1.3, **options)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0.0
) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.2, "color": INK}
    connection = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=connection, shrinkA=0, shrinkB=0, **options)
    )


if __name__ == "__main__":
    raise SystemExit(main())
