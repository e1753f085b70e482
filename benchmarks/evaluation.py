"""How long a text takes each system: the LLM alone, translate-test, the sum, the stack.

    python -m benchmarks.evaluation runs/quickstart/run/evaluate-0.toml [section.key=value ...]

What a recipe evaluated is evaluated again, with nothing kept of before, translations neither:
batches, tokenising and what is read from disk are in the figures, the loading of models is not.
All is done twice, and the first time, with what is compiled in it, does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from mtllm_engine import config as configs
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation.predictions import Predictions, load
from mtllm_engine.languages import ENGLISH
from mtllm_engine.training.launch import tell
from mtllm_engine.training.log import environment
from mtllm_engine.world import World, connect

Row = dict[str, Any]


def measure(path: Path, overrides: Sequence[str], world: World) -> list[Row]:
    """A row for each system and language."""
    with tempfile.TemporaryDirectory() as folder:
        predictions: list[Predictions] = []
        for name in ("warm", "timed"):
            own = [f"evaluate.results={folder}/{name}", f"evaluate.translations={folder}/{name}-mt"]
            config = configs.load(path, [*overrides, *own])
            evaluate(config, world)
            predictions = load(Path(folder, name))
    about = environment(world) | {"dtype": config.model.dtype, "config": str(path)}
    about |= {"attention": config.model.attention, "beams": config.evaluate.num_beams}
    return [
        about
        | {"system": item.system, "dataset": item.dataset, "language": item.language}
        | {"texts": len(item.keys), "ms_per_text": item.latency_s, "unfinished": item.unfinished}
        for item in predictions
        if item.latency_s is not None
    ]


def shown(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The median over the foreign languages of each system."""
    lines = []
    for name in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == name and row["language"] != ENGLISH]
        if not own:
            continue
        taken_ms = statistics.median(row["ms_per_text"] for row in own)
        lines.append(
            {
                "system": name,
                "languages": str(len(own)),
                "texts": str(sum(row["texts"] for row in own)),
                "ms a text": f"{taken_ms:.3g}",
                "texts/s": f"{1000 / taken_ms:.1f}",
            }
        )
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.evaluation")
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="evaluate-SEED.toml of a recipe"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON line per language")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.evaluation`."""
    arguments = build_parser().parse_intermixed_args(argv)
    world = None
    try:
        world = connect()
        rows = measure(arguments.config, arguments.overrides, world)
    except (ValueError, OSError) as error:
        tell(error, "benchmarks.evaluation", world)
        return 1
    print(f"\n{rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit']}")
    print(table(shown(rows)))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
