"""Which implementation of attention is the fastest on a GPU, at a width of heads.

`measured.json` says so: a list of {"device", "width", "torch", "commit", "ms"}, the last being
milliseconds by label, of implementations that agreed with the definition at every shape.
`python -m benchmarks.attention` makes it from the rows of benchmarks.kernels. On a GPU that nobody
measured nothing is known, and `select` takes what it takes anyway.
"""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")


def fastest(device: str, width: int) -> tuple[str, ...]:
    """Labels, the fastest first.

    Args:
        device: The GPU's name.
        width: Of a head.
    """
    for row in read():
        if (row["device"], row["width"]) == (device, width):
            return tuple(sorted(row["ms"], key=row["ms"].__getitem__))
    return ()


@functools.cache
def read() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())
