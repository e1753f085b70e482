"""Aligned against independent truncation, shown on Babel's long documents.

    python -m benchmarks.truncation [--seeds 20,21,22] [--size small] [--work DIR] [--out FILE.md]

In each seed's land configs/quickstart.toml runs with stage 1 on long documents, cut to aligned
texts or each side on its own: for an LLM whose tokenizer differs from the MT model's, and several
times over, because two trainings differ by more than the two ways to cut.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.babel import RECIPE, command
from benchmarks.tables import table
from mtllm_engine import babel, recipe
from mtllm_engine.evaluation.bootstrap import AVERAGE, summarise
from mtllm_engine.evaluation.predictions import load
from mtllm_engine.training.report import read_metrics

CUTS = ("aligned", "independent")
TRAININGS = range(2)  # by their seeds


def prove(seed: int, size: str, work: Path) -> int:
    """Trains with both ways to cut; returns the exit status of the first training that fails."""
    land = work / f"seed-{seed}" / "land"
    babel.build(land, size, seed)
    babel.build_finer_llm(land, size, seed)
    task, shards = f"sib200:{land / 'sib200'}", land / "shards"
    for number, cut in itertools.product(TRAININGS, CUTS):
        print(f"\nseed {seed}, {cut}, training {number}", flush=True)
        overrides = [
            f"recipe.dir={land.parent / f'{cut}-{number}'}",
            f"recipe.seeds=[{number}]",
            "recipe.gpus=1",
            f"model.encoder={land / 'mt'}",
            f"model.decoder={land / 'llm-finer'}",
            f"task.train={task}",
            f"task.validation={task}",
            f'task.test=["{task}"]',
            f"stage1.run.seed={number}",
            f"stage1.data.truncation={cut}",
            f'stage1.data.train=["{shards / "long"}"]',
            "stage1.optim.steps=300",
            f"stage1.validation.corpus={shards / 'validation'}",
            f"stage1.probe.folder={land / 'flores200_dataset'}",
            f'stage2.data.train=["{shards / "train"}"]',
            'evaluate.systems=["stack"]',
        ]
        if status := recipe.run(recipe.load(RECIPE, overrides)):
            return status
    return 0


def compared(seeds: Sequence[int], work: Path) -> tuple[list[dict[str, str]], float]:
    """Both ways to cut in each land and training, and how far apart they are over all trainings.

    By accuracy, and by how far the student is from the teacher after stage 1, on short documents
    that none has read (FVU).

    Returns:
        Rows of a table, and the gain in accuracy, in points.
    """
    runs = list(itertools.product(seeds, TRAININGS))
    figures = np.array([_figures(work / f"seed-{seed}", number) for seed, number in runs])
    # By run, cut and measure: accuracies, then FVUs, of both cuts.
    cells = [
        [f"{seed}, {number}", *(f"{x:.1f}" for x in accuracies), *(f"{x:.4f}" for x in fvus)]
        for (seed, number), (accuracies, fvus) in zip(runs, figures.swapaxes(1, 2))
    ]
    gains = figures[:, 0] - figures[:, 1]
    (gain, fvu_gain), (error, fvu_error) = gains.mean(0), gains.std(0, ddof=1) / len(runs) ** 0.5
    summary = [f"{gain:+.1f} ± {error:.1f}", "", f"{fvu_gain:+.4f} ± {fvu_error:.4f}", ""]
    cells.append(["aligned - independent ± standard error", *summary])
    columns = ["land, training", *CUTS, *(f"{cut}, FVU" for cut in CUTS)]
    return [dict(zip(columns, row)) for row in cells], gain


def _figures(folder: Path, training: int) -> list[list[float]]:
    """(cut, measure) of one training of each."""
    figures = []
    for cut in CUTS:
        run = folder / f"{cut}-{training}"
        (scores,) = summarise(load(run / "results"))
        _, validations = read_metrics(run / "stage1")
        accuracy = scores.scores["stack"][AVERAGE].value
        figures.append([100 * accuracy, validations[-1]["validation_fvu"]])
    return figures


def write(seeds: Sequence[int], work: Path, out: Path, origin: Mapping[str, str]) -> bool:
    """Writes the table; returns whether aligned truncation is no worse."""
    rows, gain = compared(seeds, work)
    run = f"{origin['device']}, commit {origin['commit']}: `{origin['command']}`"
    note = "Accuracy in percent over the foreign languages; aimed at: aligned no worse."
    shown = f"# Truncation\n\n{run}\n\n{note}\n\n```\n{table(rows)}\n```\n"
    out.write_text(shown, "utf-8")
    print(f"\n{shown}\n{out}")
    return bool(gain >= 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.truncation`."""
    out = "benchmarks/results/cpu/truncation.md"
    return command("benchmarks.truncation", prove, write, out, argv)


if __name__ == "__main__":
    sys.exit(main())
