"""The method's claims, shown on Babel: lands of several seeds, each beside what was aimed at.

    python -m benchmarks.babel [--seeds 20,21,22] [--size small] [--work DIR] [--out FILE.md]

Each seed is a land of its own, with its own languages, names, facts and models. In each,
configs/quickstart.toml runs on both tasks, stage 2 from stage 1, from the sum and from nothing, the
sum with fewer steps: its adapters have twice the rank, and FLOPs are to be the same. A step that is
done is not run again, so seeds may also run one by one before all are asked for. Examples of all
lands are taken together, and bootstrap intervals are over them; trainings are averaged.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.tables import table
from mtllm_engine import babel, recipe
from mtllm_engine.babel.land import SKETCHES
from mtllm_engine.evaluation.bootstrap import AVERAGE, Score, Table, compare, summarise
from mtllm_engine.evaluation.predictions import Predictions, load
from mtllm_engine.evaluation.tables import markdown, plot
from mtllm_engine.languages import ENGLISH
from mtllm_engine.sweep import share
from mtllm_engine.training.log import environment
from mtllm_engine.world import connect

RECIPE = "configs/quickstart.toml"
SEEDS = (20, 21, 22)
LOW = tuple(sketch.code for sketch in SKETCHES if sketch.pairs < 1000)  # the low-resource languages


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of a land's benchmarks, and how the recipe learns it."""

    train: str
    test: str
    steps: int
    """Of stage 2 from stage 1 or from nothing."""
    sum_steps: int
    """Of stage 2 from the sum: the same FLOPs, as twice the rank costs 1.139 of a token here."""
    settings: Sequence[str] = ()

    def paths(self, land: Path) -> list[str]:
        train, test = (f"{name}:{land / name}" for name in (self.train, self.test))
        return [f"task.train={train}", f"task.validation={test}", f'task.test=["{test}"]']


TASKS = {  # by the names of tasks
    "sib200": Task(train="sib200", test="sib200", steps=300, sum_steps=263),
    "nli": Task(
        train="mnli",
        test="xnli",
        steps=1260,
        sum_steps=1106,
        settings=["finetune.optim.epochs=6.0", "stage2.data.train=[]"],
    ),
}
FROM_STAGE1, FROM_SUM, ALONE = "stack-from-stage1", "stack-from-sum", "stage2-alone"


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


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the recipe."""

    settings: Sequence[str]
    sum: str = ""
    """What its sum is called, if that is evaluated."""
    is_first: bool = False
    """Systems that are no stack's are evaluated with it."""
    steps: int = 0
    """Of stage 2; 0: the task's."""
    mixes: bool = False
    """Half of what stage 2 reads is stage 1's text, whatever the task says."""
    tasks: Sequence[str] = tuple(TASKS)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Variants of the recipe, and what is aimed at."""

    title: str
    variants: Mapping[str, Variant]
    """By what the stack is called."""
    claims: Callable[[str, Sequence[Predictions]], list[Claim]]
    """Of a task's predictions. Raises: ValueError: A system has not been evaluated."""

    def prove(self, seed: int, size: str, work: Path) -> int:
        """Builds a land and runs the recipe in it on all tasks, in all variants; returns the exit
        status of the first that fails."""
        land = work / f"seed-{seed}" / "land"
        babel.build(land, size, seed)
        first: dict[str, Path] = {}  # what variants have alike is made once
        for task, stack in itertools.product(TASKS, self.variants):
            if task not in self.variants[stack].tasks:
                continue
            print(f"\nseed {seed}, {task}, {stack}", flush=True)
            variant = recipe.load(RECIPE, self._overrides(land, task, stack))
            share(variant, first)
            if status := recipe.run(variant):
                return status
        return 0

    def gather(self, task: str, seeds: Sequence[int], work: Path) -> list[Predictions]:
        """Every system's predictions of a task in every language, those of all lands as one."""
        found: dict[tuple[str, str], list[Predictions]] = {}
        for seed, (stack, variant) in itertools.product(seeds, self.variants.items()):
            if task not in variant.tasks:
                continue
            for item in load(work / f"seed-{seed}" / f"{task}-{stack}" / "results"):
                system = variant.sum if item.system == "sum" else item.system
                # Lands have other examples by the same keys.
                keys = [f"{seed}-{key}" for key in item.keys]
                own = replace(item, system=system, keys=keys)
                found.setdefault((system, item.language), []).append(own)
        return [_joined(items) for items in found.values()]

    def write(self, seeds: Sequence[int], work: Path, out: Path, origin: Mapping[str, str]) -> bool:
        """Writes the report, and a picture of each task beside it.

        Returns:
            Whether all claims are met.
        """
        found = {
            task: {seed: self.gather(task, [seed], work) for seed in seeds}
            | {"all": self.gather(task, seeds, work)}
            for task in TASKS
        }
        claims = {task: self.claims(task, by_seed["all"]) for task, by_seed in found.items()}
        shown = report(self.title, found, claims, origin)
        out.write_text(shown, "utf-8")
        for task, by_seed in found.items():
            plot(summarise(by_seed["all"])[0], out.with_name(f"{out.stem}-{task}.png"))
        print(f"\n{shown}\n{out}")
        return all(claim.is_met for claim in itertools.chain(*claims.values()))

    def _overrides(self, land: Path, name: str, stack: str) -> list[str]:
        variant, task = self.variants[stack], TASKS[name]
        systems = ["llm", "translate_test"] * variant.is_first + ["sum"] * bool(variant.sum)
        is_from_sum = "stage2.from=sum" in variant.settings
        steps = variant.steps or (task.sum_steps if is_from_sum else task.steps)
        mixed = [f'stage2.data.train=["{land / "shards" / "train"}"]', "stage2.data.mixture=[1,1]"]
        return [
            *_models(land),
            *task.paths(land),
            *task.settings,
            *(mixed if variant.mixes else ()),
            *variant.settings,
            f"task.name={name}",
            f"stage2.optim.steps={steps}",
            f"recipe.dir={land.parent / f'{name}-{stack}'}",
            "recipe.gpus=1",
            f"evaluate.stack_name={stack}",
            f"evaluate.systems={json.dumps([*systems, 'stack'])}",
        ]


def _joined(items: Sequence[Predictions]) -> Predictions:
    """One system's predictions in one language, of all lands."""
    flops = [item.flops for item in items if item.flops is not None]
    return replace(
        items[0],
        keys=[key for item in items for key in item.keys],
        labels=np.concatenate([item.labels for item in items]),
        predictions=np.concatenate([item.predictions for item in items]),
        latency_s=None,
        gpu_hours=None,
        flops=sum(flops) / len(flops) if flops else None,
    )


def claims(task: str, predictions: Sequence[Predictions]) -> list[Claim]:
    """What is aimed at with sums in a task."""
    best = max((FROM_STAGE1, FROM_SUM), key=lambda stack: averages_of(predictions)[stack].value)
    sum_gain = gain_of(predictions, FROM_SUM, FROM_STAGE1)
    shared = [Claim(text=f"{FROM_SUM} - {FROM_STAGE1}", score=sum_gain, least=0.0, surely=True)]
    shared.append(_beside_translation(predictions, best))
    if task == "nli":
        return shared
    low_resource = [item for item in predictions if item.language in LOW]
    low = f"low-resource ({', '.join(LOW)})"
    translated, after = (gain_of(predictions, "sum", of) for of in ("translate_test", best))
    both = gain_of(predictions, best, ALONE)
    low_gain = gain_of(low_resource, best, "translate_test")
    return [
        Claim(text="sum - translate_test", score=translated, least=0.0),
        Claim(text=f"sum - {best}", score=after, least=-0.02),
        *shared,
        Claim(text=f"{best} - translate_test, {low}", score=low_gain, least=0.05, surely=True),
        Claim(text=f"{best} - {ALONE}", score=both, least=0.0, surely=True),
        *_beside_chance(predictions, best),
    ]


def _beside_translation(predictions: Sequence[Predictions], stack: str) -> Claim:
    score = gain_of(predictions, stack, "translate_test")
    return Claim(text=f"{stack} - translate_test", score=score, least=0.0)


def _beside_chance(predictions: Sequence[Predictions], stack: str) -> list[Claim]:
    (scores,) = summarise(predictions)
    ours, llm = (scores.scores[system][AVERAGE] for system in (stack, "llm"))
    floor = 3 * max(llm.value - scores.chance, 0.05)
    bounds = {"value": ours.value, "low": ours.low, "high": ours.high}
    beyond = Score(**{name: value - scores.chance for name, value in bounds.items()})
    wanted = f"{stack} - chance, at least 3 x (llm - chance or 5)"
    return [
        Claim(text=f"{stack}, all foreign languages", score=ours, least=0.75),
        Claim(text=wanted, score=beyond, least=floor),
    ]


PROOF = Proof(
    title="Babel",
    variants={
        FROM_STAGE1: Variant(settings=["stage2.from=stage1"], sum="sum", is_first=True),
        FROM_SUM: Variant(settings=["stage2.from=sum"]),
        ALONE: Variant(settings=["stage1.optim.steps=0"]),
    },
    claims=claims,
)


def report(
    title: str,
    found: Mapping[str, Mapping[int | str, Sequence[Predictions]]],
    claims: Mapping[str, Sequence[Claim]],
    origin: Mapping[str, str],
) -> str:
    """Markdown. Args: found: of each task the predictions of each seed, and of "all"."""
    run = f"{origin['device']}, commit {origin['commit']}: `{origin['command']}`"
    note = "Accuracy in percent, [95 % bootstrap interval]; an average is over the foreign "
    note += "languages, differences are paired. FLOPs are those of what was trained for a system, "
    note += "adapters aside."
    sections = [f"# {title}\n\n{run}\n\n{note}"]
    for task, by_seed in found.items():
        (scores,) = summarise(by_seed["all"])
        rows = [_shown(claim) for claim in claims[task]]
        averages = [_row(seed, items) for seed, items in by_seed.items()]
        tables = "\n\n".join(map(table, (rows, averages, _systems(scores))))
        sections.append(f"## {scores.dataset}\n\n```\n{tables}\n```")
        languages = markdown([scores], [], 1000).replace("# Results", "### Every language")
        sections.append(languages.strip())
    return "\n\n".join(sections) + "\n"


def _row(seed: int | str, predictions: Sequence[Predictions]) -> dict[str, str]:
    averages = averages_of(predictions)
    return {"seed": str(seed)} | {system: cell(averages[system]) for system in sorted(averages)}


def _systems(scores: Table) -> list[dict[str, str]]:
    """English and the average beside one another, and what a system took to make."""
    return [
        {
            "system": system,
            "English": cell(scores.scores[system][ENGLISH]),
            "abroad": cell(scores.scores[system][AVERAGE]),
            "FLOPs to make": f"{scores.costs[system]['flops'] or 0:.3g}",
        }
        for system in sorted(scores.scores)
    ]


def _shown(claim: Claim) -> dict[str, str]:
    return {
        "claim": claim.text,
        "aimed at": f"{100 * claim.least:.1f}" + (", surely > 0" if claim.surely else ""),
        "found": cell(claim.score),
        "": "met" if claim.is_met else "missed",
    }


def cell(score: Score) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def averages_of(predictions: Sequence[Predictions]) -> dict[str, Score]:
    (scores,) = summarise(predictions)
    return {system: values[AVERAGE] for system, values in scores.scores.items()}


def gain_of(
    predictions: Sequence[Predictions], ours: str, theirs: str, *, language: str = AVERAGE
) -> Score:
    """The paired difference of two systems, abroad on average or in one language."""
    (comparison,) = compare(predictions, ours, theirs)
    return comparison.scores[language]


def _models(land: Path) -> list[str]:
    """What every variant of the recipe reads, in this land."""
    return [
        f"model.encoder={land / 'mt'}",
        f"model.decoder={land / 'llm'}",
        f'stage1.data.train=["{land / "shards" / "train"}"]',
        f'stage2.data.train=["{land / "shards" / "train"}"]',
        f"stage1.validation.corpus={land / 'shards' / 'validation'}",
        f"stage1.probe.folder={land / 'flores200_dataset'}",
    ]


def command(
    module: str,
    prove: Callable[[int, str, Path], int],
    write: Callable[[Sequence[int], Path, Path, Mapping[str, str]], bool],
    out: str,
    argv: Sequence[str] | None,
    *,
    seeds: Sequence[int] = SEEDS,
) -> int:
    """Proves in each seed's land, then writes what all came to.

    Args:
        out: Where that goes by default.
        seeds: Of the lands, by default.

    Returns:
        The exit status: 3 while a claim is missed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser(module, out, seeds).parse_args(words)
    try:
        for seed in arguments.seeds:
            if status := prove(seed, arguments.size, arguments.work):
                return status
        world = connect()
        origin = environment(world) | {"command": " ".join([f"python -m {module}", *words])}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        are_met = write(arguments.seeds, arguments.work, arguments.out, origin)
    except (ValueError, OSError) as error:
        print(f"{module}: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    world.close()
    return 0 if are_met else 3


def _seeds(text: str) -> list[int]:
    """Raises: argparse.ArgumentTypeError: They are no whole numbers with commas."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        message = f"write whole numbers with commas, such as 20,21,22, not {text}"
        raise argparse.ArgumentTypeError(message) from None


def _build_parser(module: str, out: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=module, description="A claim, shown on Babel.")
    shown = ",".join(map(str, seeds))
    parser.add_argument(
        "--seeds", default=seeds, type=_seeds, help=f"of the lands (default: {shown})"
    )
    parser.add_argument("--size", default="small", help="of the lands (default: small)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/prove"), metavar="DIR", help="where all is made"
    )
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.babel`."""
    out = "benchmarks/results/cpu/babel.md"
    return command("benchmarks.babel", PROOF.prove, PROOF.write, out, argv)


if __name__ == "__main__":
    sys.exit(main())
