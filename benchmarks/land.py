"""A small land of Babel whose models are hardly trained: for what it takes, not for what it says.

python -m benchmarks.land DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtllm_engine import babel

SIZE = babel.Size(
    documents=600,
    pairs=0.2,
    examples=84,
    inferences=60,
    lines=84,
    width=128,
    mt_steps=20,
    llm_steps=20,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.land`; what is there already stays."""
    parser = argparse.ArgumentParser(prog="benchmarks.land")
    parser.add_argument("folder", type=Path, metavar="DIR")
    babel.build_sized(parser.parse_args(argv).folder, SIZE, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
