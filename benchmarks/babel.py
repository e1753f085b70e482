"""The method's claims, shown on Babel: lands of several seeds, each beside what was aimed at.

    python -m benchmarks.babel [--seeds 10,11,12] [--size small] [--work DIR] [--out FILE.md]

Each seed is a land of its own, with its own languages, names, facts and models. In each,
configs/quickstart.toml runs as it is, and again without stage 1. Then stage 1 runs on long
documents, cut to aligned texts or each side on its own: for an LLM whose tokenizer differs from the
MT model's, and several times over, because two trainings differ by more than the two ways to cut. A
step that is done is not run again, so seeds may also run one by one before all are asked for.
Examples of all lands are taken together, and bootstrap intervals are over them; trainings are
averaged.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.tables import table
from mtllm_engine import babel, recipe
from mtllm_engine.babel.land import SKETCHES
from mtllm_engine.evaluation.bootstrap import AVERAGE, Score, compare, summarise
from mtllm_engine.evaluation.predictions import Predictions, load
from mtllm_engine.evaluation.tables import markdown, plot
from mtllm_engine.training.log import environment
from mtllm_engine.training.report import read_metrics
from mtllm_engine.world import connect

RECIPE = "configs/quickstart.toml"
LOW = tuple(sketch.code for sketch in SKETCHES if sketch.pairs < 1000)  # the low-resource languages
TRAININGS = range(2)  # on long documents, by their seeds


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A run of the recipe: what it reads, and what differs in it."""

    settings: Sequence[str] = ()
    corpus: str = "train"
    llm: str = "llm"
    seed: int = 0


def _long(truncation: str, seed: int) -> Variant:
    name, steps = f"evaluate.stack_name=long-{truncation}", "stage1.optim.steps=300"
    settings = [name, steps, f"stage1.data.truncation={truncation}", f"stage1.run.seed={seed}"]
    return Variant(settings=settings, corpus="long", llm="llm-finer", seed=seed)


CUTS = ("aligned", "independent")
VARIANTS = {  # by folder
    "whole": Variant(),
    "stage2": Variant(settings=["evaluate.stack_name=stage-2-alone", "stage1.optim.steps=0"]),
    **{f"{cut}-{seed}": _long(cut, seed) for seed in TRAININGS for cut in CUTS},
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What was aimed at: that the value, or all of its interval, is at least `least`."""

    text: str
    score: Score
    least: float
    surely: bool = False

    @property
    def is_met(self) -> bool:
        return self.score.value >= self.least and (not self.surely or self.score.low > 0)


def prove(seed: int, size: str, work: Path) -> int:
    """Builds a land and runs all variants of the recipe in it; returns the exit status of the first
    that fails."""
    land = work / f"seed-{seed}" / "land"
    babel.build(land, size, seed)
    babel.build_finer_llm(land, size, seed)
    for name, variant in VARIANTS.items():
        overrides = [*_paths(land, variant), *variant.settings, "recipe.gpus=1"]
        overrides += [f"recipe.seeds=[{variant.seed}]", f"recipe.dir={land.parent / name}"]
        if name != "whole":
            overrides.append('evaluate.systems=["stack"]')
        print(f"\nseed {seed}, {name}", flush=True)
        if status := recipe.run(recipe.load(RECIPE, overrides)):
            return status
    return 0


def gather(seeds: Sequence[int], work: Path) -> list[Predictions]:
    """Every training's predictions in every language, those of all lands as one."""
    parts: dict[tuple[str, str, int], list[Predictions]] = {}
    for seed, name in itertools.product(seeds, VARIANTS):
        for item in load(work / f"seed-{seed}" / name / "results"):
            # Lands have other examples by the same keys.
            own = replace(item, keys=[f"{seed}-{key}" for key in item.keys])
            parts.setdefault((item.system, item.language, item.seed), []).append(own)
    return [_joined(items) for items in parts.values()]


def claims(predictions: Sequence[Predictions]) -> list[Claim]:
    """Raises: ValueError: A system has not been evaluated."""
    low_resource = [item for item in predictions if item.language in LOW]
    low, both = f"low-resource ({', '.join(LOW)})", "stages 1 and 2 - stage 2 alone"
    gain, low_gain = (_gain(items, "translate_test") for items in (predictions, low_resource))
    stage1, low_stage1 = (_gain(items, "stage-2-alone") for items in (predictions, low_resource))
    cut = _gain(predictions, "long-independent", "long-aligned")
    return [
        *_claims_beside_chance(predictions),
        Claim(text="stack - translate-test", score=gain, least=0.0),
        Claim(text=f"stack - translate-test, {low}", score=low_gain, least=0.05, surely=True),
        Claim(text=both, score=stage1, least=0.0, surely=True),
        Claim(text=f"{both}, low-resource", score=low_stage1, least=0.05, surely=True),
        Claim(text="long documents: aligned - independent truncation", score=cut, least=0.0),
    ]


def _claims_beside_chance(predictions: Sequence[Predictions]) -> list[Claim]:
    (scores,) = summarise(predictions)
    stack, llm = (scores.scores[system][AVERAGE] for system in ("stack", "llm"))
    floor = 3 * max(llm.value - scores.chance, 0.05)
    bounds = {"value": stack.value, "low": stack.low, "high": stack.high}
    beyond = Score(**{name: value - scores.chance for name, value in bounds.items()})
    wanted = "stack - chance, at least 3 x (LLM - chance or 0.05)"
    return [
        Claim(text="stack, all foreign languages", score=stack, least=0.75),
        Claim(text=wanted, score=beyond, least=floor),
    ]


def truncation(seeds: Sequence[int], work: Path) -> list[dict[str, str]]:
    """Both ways to cut in each land and training, and how far apart they are over all trainings.

    By accuracy, and by how far the student is from the teacher after stage 1, on short documents
    that none has read (FVU).
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
    return [dict(zip(columns, row)) for row in cells]


def _figures(folder: Path, training: int) -> list[list[float]]:
    """(cut, measure) of one training of each."""
    figures = []
    for cut in CUTS:
        run = folder / f"{cut}-{training}"
        (scores,) = summarise(load(run / "results"))
        _, validations = read_metrics(run / "stage1")
        accuracy = scores.scores[f"long-{cut}"][AVERAGE].value
        figures.append([100 * accuracy, validations[-1]["validation_fvu"]])
    return figures


def report(
    predictions: Sequence[Predictions],
    by_seed: dict[int, list[Predictions]],
    cuts: list[dict[str, str]],
    origin: dict,
) -> str:
    """Markdown: the claims, then each seed's averages, then `truncation`."""
    rows = [_shown(claim) for claim in claims(predictions)]
    averages = []
    for seed, items in by_seed.items():
        (scores,) = summarise(items)
        cells = {system: _cell(scores.scores[system][AVERAGE]) for system in sorted(scores.scores)}
        averages.append({"seed": str(seed)} | cells)
    run = f"{origin['device']}, commit {origin['commit']}: `{origin['command']}`"
    note = "Accuracy in percent over the foreign languages, [95 % bootstrap interval]; "
    note += "differences are paired."
    tables = "\n\n".join(map(table, (rows, averages, cuts)))
    return f"# Babel\n\n{run}\n\n{note}\n\n```\n{tables}\n```\n"


def _shown(claim: Claim) -> dict[str, str]:
    return {
        "claim": claim.text,
        "aimed at": f"{100 * claim.least:.1f}" + (", surely > 0" if claim.surely else ""),
        "found": _cell(claim.score),
        "": "met" if claim.is_met else "missed",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.babel`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_args(words)
    try:
        for seed in (seeds := arguments.seeds):
            if status := prove(seed, arguments.size, arguments.work):
                return status
        world = connect()
        origin = environment(world) | {"command": " ".join(["python -m benchmarks.babel", *words])}
        are_met = _write(arguments.work, seeds, arguments.out, origin)
    except (ValueError, OSError) as error:
        print("benchmarks.babel: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    world.close()
    return 0 if are_met else 3


def _paths(land: Path, variant: Variant) -> list[str]:
    """What the recipe reads, in this land."""
    task, shards = f"sib200:{land / 'sib200'}", land / "shards"
    return [
        f"model.encoder={land / 'mt'}",
        f"model.decoder={land / variant.llm}",
        f"task.train={task}",
        f"task.validation={task}",
        f'task.test=["{task}"]',
        f'stage1.data.train=["{shards / variant.corpus}"]',
        f'stage2.data.train=["{shards / "train"}"]',
        f"stage1.validation.corpus={shards / 'validation'}",
        f"stage1.probe.folder={land / 'flores200_dataset'}",
    ]


def _joined(items: Sequence[Predictions]) -> Predictions:
    """One system's predictions in one language, of all lands."""
    return replace(
        items[0],
        keys=[key for item in items for key in item.keys],
        labels=np.concatenate([item.labels for item in items]),
        predictions=np.concatenate([item.predictions for item in items]),
        latency_s=None,
    )


def _gain(predictions: Sequence[Predictions], theirs: str, ours: str = "stack") -> Score:
    (comparison,) = compare(predictions, ours, theirs)
    return comparison.scores[AVERAGE]


def _cell(score: Score) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _write(work: Path, seeds: Sequence[int], out: Path, origin: dict) -> bool:
    """Writes the report, every language's figures below it, and a picture beside it.

    Returns:
        Whether all claims are met.
    """
    by_seed = {seed: gather([seed], work) for seed in seeds}
    predictions = gather(seeds, work)
    shown = report(predictions, by_seed, truncation(seeds, work), origin)
    tables = summarise(predictions)
    out.parent.mkdir(parents=True, exist_ok=True)
    languages = markdown(tables, [], 1000).replace("# Results", "## Every language")
    out.write_text(f"{shown}\n{languages}", "utf-8")
    plot(tables[0], out.with_suffix(".png"))
    print(f"\n{shown}\n{out}")
    return all(claim.is_met for claim in claims(predictions))


def _seeds(text: str) -> list[int]:
    """Raises: argparse.ArgumentTypeError: They are no whole numbers with commas."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        message = f"write whole numbers with commas, such as 10,11,12, not {text}"
        raise argparse.ArgumentTypeError(message) from None


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.babel", description="The method's claims, shown on Babel."
    )
    parser.add_argument(
        "--seeds", default=[10, 11, 12], type=_seeds, help="of the lands (default: 10,11,12)"
    )
    parser.add_argument("--size", default="small", help="of the lands (default: small)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/prove"), metavar="DIR", help="where all is made"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/cpu/babel.md"), metavar="FILE"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
