"""What a person sees of the step benchmark: tables, charts, and efficiency over rank counts."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.profile import cells

LINEAR = 0.10  # how far a pack size's cost per token may be from the median of all

Row = dict[str, Any]


def show(rows: Sequence[Row], out: Path | None) -> int:
    """Prints figures and parts, by lengths; draws the chart."""
    first = rows[0]
    where = f"{first['world_size']} x {first['device']}, ZeRO stage {first['zero_stage']}"
    weights = f"{first['dtype']}, weights {first['weights']}"
    print(f"{where}, {weights}, commit {first['commit']}")
    ours = {
        row["variant"]: row["quantization"] for row in rows if row["variant"].startswith("ours")
    }
    if quantised := {name: form for name, form in ours.items() if form != "none"}:
        held = " and ".join(f"{name} in {form}" for name, form in quantised.items())
        apart = f"losses and gradient norms may be {first['tolerance']:.0%} apart"
        print(f"LLM's linears: {held}, the others in full: {apart}, and errors say how far")
    print(f"a product of large random matrices reaches {first['gemm_tflops']:.4g} TFLOP/s here")
    if "all_gather_gbytes_per_s" in first:
        print(f"an all-gather of a layer reaches {first['all_gather_gbytes_per_s']:.4g} GB/s")
    for key in dict.fromkeys((row["lengths"], row["data"]) for row in rows):
        group = [row for row in rows if (row["lengths"], row["data"]) == key]
        if key[1] == "sweep":
            print(f"\nlengths {key[0]}, what suits each of the others\n{table(_tried(group))}")
            continue
        tokens = f"{group[0]['documents']} documents, {group[0]['pair_tokens']:.0f} pairs"
        print(f"\nlengths {key[0]}, data {key[1]}: {tokens} in the first timed step")
        print(table([_figures(row, group[0]) for row in group]))
        if "split_s" in group[0]:
            print(f"\nmilliseconds, measured apart\n{table([_parts(row) for row in group])}")
            for row in group:
                print(f"\n{row['variant']}, by kinds of kernels\n{table(cells(row['profile']))}")
    if out is not None:
        draw(rows, out.with_suffix(".png"))
    return 0


def _tried(rows: Sequence[Row]) -> list[dict[str, str]]:
    best = {row["variant"]: 0.0 for row in rows}
    for row in rows:
        best[row["variant"]] = max(best[row["variant"]], row["pairs_per_s"] or 0.0)
    return [
        {
            "variant": row["variant"],
            "batch": str(row["batch"]),
            "checkpointing": "yes" if row["checkpointing"] else "no",
            "compiled": "yes" if row["compiled"] else "no",
            "pairs/s": f"{row['pairs_per_s']:.0f}" if row["pairs_per_s"] else row["status"],
            "best": "*" if row["pairs_per_s"] == best[row["variant"]] else "",
        }
        for row in rows
    ]


def _figures(row: Row, first: Row) -> dict[str, str]:
    pairs = row["pairs_per_s"]
    figures = {
        "variant": row["variant"],
        "pairs/s": f"{pairs['median']:.0f}",
        "p20-p80": f"{pairs['p20']:.0f}-{pairs['p80']:.0f}",
        "documents/s": f"{row['documents_per_s']['median']:.1f}",
        "ours is": f"{first['pairs_per_s']['median'] / pairs['median']:.2f} x",
        "MFU": f"{row['mfu']:.1%}" if row["mfu"] else "-",
        "of GEMM": f"{row['gemm_share']:.1%}",
    }
    if "data_wait_s" in row:
        figures["waits for data"] = f"{row['data_wait_s']['median'] / row['step_s']['median']:.1%}"
    if "peak_bytes" in row:
        figures["peak MiB"] = f"{row['peak_bytes'] / 2**20:.0f}"
        figures["in the step"] = f"{row['step_bytes'] / 2**20:.0f}"
        figures["kernels"] = str(row["kernels"])
    if "gathered_bytes" in row:
        figures["gathered MiB"] = f"{row['gathered_bytes'] / 2**20:.1f}"
    return figures | {"error": f"{row['error']:.0e}", "batch": str(row["batch"])}


def _parts(row: Row) -> dict[str, str]:
    split_s = row["split_s"]
    # Collectives overlap the other parts.
    step_s = sum(taken_s for name, taken_s in split_s.items() if name != "collectives")
    return (
        {"variant": row["variant"]}
        | {name: f"{1000 * taken_s:.1f}" for name, taken_s in split_s.items()}
        | {"encoder's share": f"{split_s['encoder'] / step_s:.1%}"}
        | {"its padding": "-" if row["padding"] is None else f"{row['padding']:.1%}"}
    )


def table(rows: Sequence[dict[str, str]]) -> str:
    """Columns of the first row; names to the left, numbers to the right."""
    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def draw(
    rows: Sequence[Row], path: Path, *, unit: str = "pairs", caption: str | None = None
) -> None:
    """Bars: a rate and the peak memory of each variant, by lengths.

    Args:
        unit: Of the rate, which stands in the rows as `UNIT_per_s`.
        caption: By default what a step's rows say.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "peak_bytes" in row]
    groups, names = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("lengths", "variant")
    )
    is_large = max(row["peak_bytes"] for row in rows) >= 2**33
    size, size_unit, digits = (2**30, "GiB", 1) if is_large else (2**20, "MiB", 0)
    small = 8 if len(names) * len(groups) <= 8 else 6  # or figures run into one another
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, title, shown, value in (
        (axes[0], f"{unit}/s", "%.0f", lambda row: row[f"{unit}_per_s"]["median"]),
        (
            axes[1],
            f"peak memory of a rank, {size_unit}",
            f"%.{digits}f",
            lambda row: row["peak_bytes"] / size,
        ),
    ):
        for number, name in enumerate(names):
            heights = {row["lengths"]: value(row) for row in rows if row["variant"] == name}
            lefts = [group + number / (len(names) + 1) for group in range(len(groups))]
            width, values = 1 / (len(names) + 1.5), [heights[group] for group in groups]
            axis.bar_label(axis.bar(lefts, values, width, label=name), fmt=shown, fontsize=small)
        middle = (len(names) - 1) / (len(names) + 1) / 2
        middles = [group + middle for group in range(len(groups))]
        axis.set_xticks(middles, [f"lengths {group}" for group in groups])
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    below = {"loc": "outside lower center", "ncols": min(4, len(names)), "frameon": False}
    below |= {"fontsize": 8} if len(names) > 4 else {}
    figure.legend(*axes[0].get_legend_handles_labels(), **below)
    figure.suptitle(_caption(rows[0]) if caption is None else caption, fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"\nchart: {path}")


def show_linear(rows: Sequence[Row], out: Path | None) -> int:
    """Our cost per token by pack size, for each distribution of lengths.

    Returns:
        1 when one is not linear.
    """
    costs = {text: [] for text in dict.fromkeys(row["lengths"] for row in rows)}
    sizes = list(dict.fromkeys(row["pack_tokens"] for row in rows))
    for row in rows:
        costs[row["lengths"]].append(1e6 / row["pairs_per_s"]["median"])
    worst = {}
    for text, of_size in costs.items():
        middle = statistics.median(of_size)
        lines = [
            {
                "pack tokens": f"{size}",
                "us/pair": f"{cost:.3f}",
                "of the median": f"{cost / middle:.2f}",
            }
            for size, cost in zip(sizes, of_size)
        ]
        worst[text] = max(abs(cost / middle - 1) for cost in of_size)
        verdict = "linear" if worst[text] <= LINEAR else "not linear"
        print(f"\nlengths {text}\n{table(lines)}")
        print(f"cost per token within {worst[text]:.0%} of its median: {verdict}")
    if out is not None:
        draw_linear(sizes, costs, rows[0], out.with_suffix(".png"))
    return int(max(worst.values()) > LINEAR)


def draw_linear(sizes: Sequence[int], costs: dict[str, list[float]], row: Row, path: Path) -> None:
    """Lines, each in the band that is called linear."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for text, of_size in costs.items():
        (line,) = axis.plot(sizes, of_size, marker="o", label=f"lengths {text}")
        middle = statistics.median(of_size)
        band = ((1 - LINEAR) * middle, (1 + LINEAR) * middle)
        axis.fill_between(sizes, *band, color=line.get_color(), alpha=0.12)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set(xlabel="tokens in a pack, each side", ylabel="microseconds per pair")
    axis.set_ylim(0, 1.2 * max(map(max, costs.values())))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(_caption(row), fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"\nchart: {path}")


def _caption(row: Row) -> str:
    device = f"{row['world_size']} x {row['device']}"
    return f"{device}, {row['weights']}, {row['dtype']}, commit {row['commit']}"


def show_scaling(files: Sequence[Path]) -> int:
    """Throughput over rank counts, against the smallest; weak where a rank's share stays, strong
    where the whole does.

    Raises:
        ValueError: A file holds no rows of this benchmark.
    """
    rows = sorted((row for file in files for row in _load(file)), key=lambda row: row["world_size"])
    for key in dict.fromkeys((row["variant"], row["lengths"], row["data"]) for row in rows):
        group = [row for row in rows if (row["variant"], row["lengths"], row["data"]) == key]
        print(f"\n{key[0]}, lengths {key[1]}, data {key[2]}")
        print(table([_scaled(row, group[0]) for row in group]))
    return 0


def _scaled(row: Row, first: Row) -> dict[str, str]:
    ranks, growth = row["world_size"], row["pair_tokens"] / first["pair_tokens"]
    kinds = {"strong": 1, "weak": ranks / first["world_size"]}
    kind = min(kinds, key=lambda name: abs(growth - kinds[name])) if row is not first else "-"
    gain = row["pairs_per_s"]["median"] / first["pairs_per_s"]["median"]
    slowest = max(rank["median"] for rank in row["rank_step_s"])
    fastest = min(rank["median"] for rank in row["rank_step_s"])
    return {
        "ranks": str(ranks),
        "scaling": kind,
        "pairs a step": f"{row['pair_tokens']:.0f}",
        "pairs/s": f"{row['pairs_per_s']['median']:.0f}",
        "a rank": f"{row['pairs_per_s']['median'] / ranks:.0f}",
        "efficiency": f"{gain * first['world_size'] / ranks:.1%}",
        "ranks' median ms": f"{1000 * fastest:.1f}-{1000 * slowest:.1f}",
        "gathered MiB": f"{row['gathered_bytes'] / 2**20:.1f}" if "gathered_bytes" in row else "-",
        "all-gather GB/s": f"{row['all_gather_gbytes_per_s']:.3g}"
        if "all_gather_gbytes_per_s" in row
        else "-",
    }


def _load(file: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} has a line that is not JSON: {error}") from error
    if not rows or any("rank_step_s" not in row for row in rows):
        raise ValueError(f"{file} holds no rows of benchmarks.step --out")
    return rows
