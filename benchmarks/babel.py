"""The method's claims, shown on Babel: worlds of several seeds, with all figures beside what was aimed at.

    python -m benchmarks.babel [--seeds 10,11,12] [--size small] [--work DIR] [--out FILE.md]

Each seed is a world of its own, with its own languages, names, facts and models. In each, configs/quickstart.toml runs
as it is, and again without stage 1. Then stage 1 runs on long documents, cut to aligned texts or each side on its own:
for an LLM whose tokenizer differs from the MT model's, and several times over, because two trainings differ by more
than the two ways to cut. A step that is done is not run again, so seeds may also run one by one before all are asked
for. Examples of all worlds are taken together, and bootstrap intervals are over them; trainings are averaged.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.tables import table
from mtllm_engine import babel, recipe, results
from mtllm_engine.babel.world import SKETCHES
from mtllm_engine.metrics import environment
from mtllm_engine.report import read_metrics
from mtllm_engine.results import Predictions, compare, summarise
from mtllm_engine.tables import AVERAGE, Score, markdown, plot
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
    """Builds a world and runs all variants of the recipe in it; the exit status of the first that fails."""
    world = work / f"seed-{seed}" / "world"
    babel.build(world, size, seed)
    babel.build_finer_llm(world, size, seed)
    for name, variant in VARIANTS.items():
        overrides = [*_places(world, variant), f"recipe.seeds=[{variant.seed}]", "recipe.gpus=1", *variant.settings]
        if name != "whole":
            overrides.append('evaluate.systems=["stack"]')
        print(f"\nseed {seed}, {name}", flush=True)
        if status := recipe.run(recipe.load(RECIPE, [*overrides, f"recipe.dir={world.parent / name}"])):
            return status
    return 0


def gather(seeds: Sequence[int], work: Path) -> list[Predictions]:
    """Every training's predictions in every language, those of all worlds as one."""
    found: dict[tuple[str, str, int], list[Predictions]] = {}
    for seed in seeds:
        for name in VARIANTS:
            for item in results.load(work / f"seed-{seed}" / name / "results"):
                keys = [f"{seed}-{key}" for key in item.keys]  # worlds have other examples by the same keys
                found.setdefault((item.system, item.language, item.seed), []).append(replace(item, keys=keys))
    return [_joined(items) for items in found.values()]


def claims(predictions: Sequence[Predictions]) -> list[Claim]:
    """Raises: ValueError: A system has not been evaluated."""
    (scores,) = summarise(predictions)
    stack, llm = (scores.scores[system][AVERAGE] for system in ("stack", "llm"))
    floor = 3 * max(llm.value - scores.chance, 0.05)
    beyond = Score(value=stack.value - scores.chance, low=stack.low - scores.chance, high=stack.high - scores.chance)
    low_resource = [item for item in predictions if item.language in LOW]
    return [
        Claim(text="stack, all foreign languages", score=stack, least=0.75),
        Claim(text="stack - chance, at least 3 x (LLM - chance or 0.05)", score=beyond, least=floor),
        Claim(text="stack - translate-test", score=_gain(predictions, "translate_test"), least=0.0),
        Claim(
            text=f"stack - translate-test, low-resource ({', '.join(LOW)})",
            score=_gain(low_resource, "translate_test"),
            least=0.05,
            surely=True,
        ),
        Claim(
            text="stages 1 and 2 - stage 2 alone",
            score=_gain(predictions, "stage-2-alone"),
            least=0.0,
            surely=True,
        ),
        Claim(
            text="stages 1 and 2 - stage 2 alone, low-resource",
            score=_gain(low_resource, "stage-2-alone"),
            least=0.05,
            surely=True,
        ),
        Claim(
            text="long documents: aligned - independent truncation",
            score=_gain(predictions, "long-independent", "long-aligned"),
            least=0.0,
        ),
    ]


def truncation(seeds: Sequence[int], work: Path) -> list[dict[str, str]]:
    """Both ways to cut in each world and training, and how far apart they are by all trainings alike: accuracy, and
    how far the student is from the teacher after stage 1, on short documents that none has read (FVU).
    """
    runs = [(seed, training) for seed in seeds for training in TRAININGS]
    found_R22 = np.array([_figures(work / f"seed-{seed}", training) for seed, training in runs])  # run, cut, measure
    gains_R2 = found_R22[:, 0] - found_R22[:, 1]
    errors_2 = gains_R2.std(axis=0, ddof=1) / len(runs) ** 0.5
    cells = [[f"{seed}, {training}"] for seed, training in runs]
    for row, values_22 in zip(cells, found_R22):
        row += [f"{value:.1f}" for value in values_22[:, 0]] + [f"{value:.4f}" for value in values_22[:, 1]]
    gain, fvu_gain = gains_R2.mean(axis=0)
    told = [f"{gain:+.1f} ± {errors_2[0]:.1f}", "", f"{fvu_gain:+.4f} ± {errors_2[1]:.4f}", ""]
    cells.append(["aligned - independent ± standard error", *told])
    columns = ["world, training", *CUTS, *(f"{cut}, FVU" for cut in CUTS)]
    return [dict(zip(columns, row)) for row in cells]


def _figures(folder: Path, training: int) -> list[list[float]]:
    """(cut, measure) of one training of each."""
    found = []
    for cut in CUTS:
        run = folder / f"{cut}-{training}"
        (scores,) = summarise(results.load(run / "results"))
        _, validations = read_metrics(run / "stage1")
        accuracy = scores.scores[f"long-{cut}"][AVERAGE].value
        found.append([100 * accuracy, validations[-1]["validation_fvu"]])
    return found


def report(
    predictions: Sequence[Predictions], by_seed: dict[int, list[Predictions]], cuts: list[dict[str, str]], origin: dict
) -> str:
    """Markdown: the claims, then each seed's averages, then `truncation`."""
    shown = [
        {
            "claim": claim.text,
            "aimed at": f"{100 * claim.least:.1f}" + (", surely > 0" if claim.surely else ""),
            "found": _cell(claim.score),
            "": "met" if claim.is_met else "missed",
        }
        for claim in claims(predictions)
    ]
    averages = []
    for seed, items in by_seed.items():
        (scores,) = summarise(items)
        cells = {system: _cell(scores.scores[system][AVERAGE]) for system in sorted(scores.scores)}
        averages.append({"seed": str(seed)} | cells)
    told = f"{origin['device']}, commit {origin['commit']}: `{origin['command']}`"
    note = "Accuracy in percent over the foreign languages, [95 % bootstrap interval]; differences are paired."
    return f"# Babel\n\n{told}\n\n{note}\n\n```\n{table(shown)}\n\n{table(averages)}\n\n{table(cuts)}\n```\n"


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


def _places(world: Path, variant: Variant) -> list[str]:
    """What the recipe reads, in this world."""
    task = f"sib200:{world / 'sib200'}"
    return [
        f"model.encoder={world / 'mt'}",
        f"model.decoder={world / variant.llm}",
        f"task.train={task}",
        f"task.validation={task}",
        f'task.test=["{task}"]',
        f'stage1.data.train=["{world / "shards" / variant.corpus}"]',
        f'distil.data.train=["{world / "shards" / "train"}"]',
        f"stage1.data.validation={world / 'shards' / 'validation'}",
        f"stage1.probe.folder={world / 'flores200_dataset'}",
    ]


def _joined(items: Sequence[Predictions]) -> Predictions:
    """One system's predictions in one language, of all worlds."""
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
    """The report, every language's figures below it, and a picture beside it; whether all claims are met."""
    by_seed = {seed: gather([seed], work) for seed in seeds}
    predictions = gather(seeds, work)
    shown = report(predictions, by_seed, truncation(seeds, work), origin)
    tables = summarise(predictions)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(shown + "\n" + markdown(tables, [], 1000).replace("# Results", "## Every language"), "utf-8")
    plot(tables[0], out.with_suffix(".png"))
    print(f"\n{shown}\n{out}")
    return all(claim.is_met for claim in claims(predictions))


def _seeds(text: str) -> list[int]:
    """Raises: argparse.ArgumentTypeError: They are no whole numbers with commas."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write whole numbers with commas, such as 10,11,12, not {text}") from None


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.babel", description="The method's claims, shown on Babel.")
    parser.add_argument("--seeds", default=[10, 11, 12], type=_seeds, help="of the worlds (default: 10,11,12)")
    parser.add_argument("--size", default="small", help="of the worlds (default: small)")
    parser.add_argument("--work", type=Path, default=Path("runs/prove"), metavar="DIR", help="where all is made")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/babel.md"), metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
