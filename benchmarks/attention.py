"""Which implementation of attention is the fastest on a GPU: what `model.attention = "auto"` takes.

    python -m benchmarks.attention kernels.jsonl ...   # rows of benchmarks.kernels --op attention

Writes kernels/attention/measured.json anew for the devices and widths of these rows, and leaves
others. An implementation counts where it agreed with the definition at every shape of a width. What
it takes is a forward and a backward of each shape, and its share of what it needs for lengths that
it has not seen: a pack's lengths are new in each step, and the same in all layers.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtllm_engine.kernels.attention import attention, measured

LAYERS = 32  # of the LLM: so often is a pack's plan used

Row = dict[str, Any]


def ranking(rows: Iterable[Row]) -> list[Row]:
    """What `measured.json` says of the rows' devices and widths."""
    shapes: dict[tuple[str, int], set[str]] = defaultdict(set)
    taken_ms: dict[tuple[str, int], dict[str, dict[str, float]]] = defaultdict(dict)
    about: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["op"] != "attention" or row["provider"] not in attention.implementations:
            continue
        key, shape = (row["device"], row["shape"]["width"]), json.dumps(row["shape"])
        shapes[key].add(shape)
        about[key] = {"torch": row["torch"], "commit": row["commit"]}
        if row["status"] == "ok":
            own = taken_ms[key].setdefault(row["provider"], {})
            planning_ms = (row.get("first_ms") or 0.0) / LAYERS / 2  # in each of two passes' rows
            own[shape] = own.get(shape, 0.0) + row["median_ms"] + planning_ms
    return [
        {"device": device, "width": width, **about[device, width]}
        | {
            "ms": {
                label: round(sum(own.values()), 4)
                for label, own in taken_ms[device, width].items()
                if own.keys() == shapes[device, width]
            }
        }
        for device, width in sorted(shapes)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.attention`."""
    parser = argparse.ArgumentParser(prog="benchmarks.attention")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of benchmarks.kernels")
    arguments = parser.parse_args(argv)
    lines = [line for file in arguments.files for line in file.read_text().splitlines()]
    new = ranking(row for row in map(json.loads, lines) if row["driver"])  # a GPU's
    if not any(row["ms"] for row in new):
        print("benchmarks.attention: error: no row is of an implementation that ran on a GPU")
        return 1
    made = {(row["device"], row["width"]) for row in new}
    kept = [row for row in measured.read() if (row["device"], row["width"]) not in made]
    table = sorted([*kept, *new], key=lambda row: (row["device"], row["width"]))
    measured.FILE.write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        order = sorted(row["ms"], key=row["ms"].__getitem__)
        print(f"{row['device']}, heads of {row['width']}: {', '.join(order)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
