"""What `benchmarks.real` found: claims, tables, and a picture of all languages by their script."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.babel import Claim, cell
from benchmarks.tables import table
from mtllm_engine.data.vocabulary import read_languages
from mtllm_engine.evaluation.bootstrap import Score
from mtllm_engine.evaluation.predictions import load
from mtllm_engine.files import write_text
from mtllm_engine.languages import ENGLISH, NAMES, SCRIPTS
from mtllm_engine.tasks.sib200 import LABELS
from mtllm_engine.training.log import environment
from mtllm_engine.world import connect

ALONE = "stage2_alone"
SYSTEMS = {
    "llm": "LLM alone",
    "encoder": "encoder alone",
    ALONE: "stage 2 alone",
    "sum": "sum",
    "stack": "stack",
}
OURS = ("sum", "stack")
CHANCE = 1 / len(LABELS)
RESAMPLES = 2000
PER_ROW = 50  # languages of the picture
MARKERS = {"llm": ("v", "C3"), "encoder": ("x", "C7"), "sum": ("^", "C0"), "stack": ("o", "C2")}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What systems answered in the same languages, all of which have the same examples."""

    systems: tuple[str, ...]
    languages: tuple[str, ...]
    right: np.ndarray
    """fp64 (systems, languages, N): the share of seeds whose answer is right."""
    known: frozenset[str]
    """The languages that the encoder was trained on."""

    def score(self, system: str, languages: Sequence[str], less: str = "") -> Score:
        """The mean over languages, perhaps less another system's, paired. Its interval is over
        examples, which all languages share, and, where there are several, over languages too."""
        rows = [self.languages.index(language) for language in languages]
        right_LN = self.right[self.systems.index(system)][rows]
        if less:
            right_LN = right_LN - self.right[self.systems.index(less)][rows]
        # How often each language and example is drawn, in every resample.
        random = np.random.default_rng(0)
        counts_XL, counts_XN = (
            random.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size
            for size in right_LN.shape
        )
        values = (counts_XL @ right_LN * counts_XN).sum(1)
        low, high = np.quantile(values, (0.025, 0.975))
        return Score(value=float(right_LN.mean()), low=float(low), high=float(high))

    @property
    def foreign(self) -> list[str]:
        return [language for language in self.languages if language != ENGLISH]

    def group(self, known: bool) -> list[str]:
        return [language for language in self.foreign if (language in self.known) == known]


def gather(folders: Sequence[Path], known: frozenset[str]) -> Answers:
    """Raises: ValueError: Nothing was evaluated, or systems answered other examples."""
    items = list(itertools.chain(*map(load, folders)))
    systems = tuple(system for system in SYSTEMS if any(each.system == system for each in items))
    everywhere = [{each.language for each in items if each.system == system} for system in systems]
    languages = tuple(sorted(set.intersection(*everywhere)))
    keys = items[0].keys
    cells: dict[tuple[str, str], list[np.ndarray]] = {}
    for each in items:
        if list(each.keys) != list(keys):
            raise ValueError(f"{each.identity}: other examples than {items[0].identity}")
        right_N = np.asarray(each.labels) == np.asarray(each.predictions)
        cells.setdefault((each.system, each.language), []).append(right_N)
    right = [[np.mean(cells[system, code], axis=0) for code in languages] for system in systems]
    return Answers(systems=systems, languages=languages, right=np.array(right), known=known)


def claims(answers: Answers) -> list[Claim]:
    """What was aimed at on the pair, abroad in languages named beforehand."""
    foreign, known = answers.foreign, answers.group(True)
    best = max(OURS, key=lambda system: answers.score(system, foreign).value)
    best_known = max(OURS, key=lambda system: answers.score(system, known).value)
    teacher = answers.score("llm", [ENGLISH]).value - CHANCE
    ours = answers.score(best_known, known)
    share = Score(
        **{name: (getattr(ours, name) - CHANCE) / teacher for name in ("value", "low", "high")}
    )
    text = f"{SYSTEMS[best_known]}, languages that the encoder knows: share of the English "
    text += "teacher's accuracy above chance"
    name = SYSTEMS[best]
    return [
        Claim(text=f"{name} - LLM alone", score=answers.score(best, foreign, "llm"), least=0.25),
        Claim(text=text, score=share, least=0.8),
        Claim(
            text=f"{name} - stage 2 alone",
            score=answers.score(best, foreign, ALONE),
            least=0.0,
            surely=True,
        ),
    ]


def write(work: Path, out: Path, command: str, settings: str) -> None:
    """Writes the report, and the picture beside it."""
    world = connect()
    origin = environment(world)
    world.close()
    known = read_languages(work / "e5").codes
    few = gather([work / "run" / "results", work / "alone" / "results"], known)
    wide = gather([work / "wide" / "results"], known)
    out.parent.mkdir(parents=True, exist_ok=True)
    plot(few, wide, out.with_suffix(".png"))
    where = f"{origin['device']}, commit {origin['commit']}: `{command}`"
    write_text(out, report(few, wide, f"{where}; settings sha256 {settings[:12]}"))
    print(f"\n{out.read_text('utf-8')}\n{out}\n{out.with_suffix('.png')}")


def report(few: Answers, wide: Answers, where: str) -> str:
    """Markdown."""
    note = "Accuracy in percent over the 204 test sentences of SIB-200 (seven topics, chance "
    note += f"{100 * CHANCE:.1f}), a mean over seeds, with 95 % bootstrap intervals over examples "
    note += "and, of an average, over languages too; differences are paired."
    aims = [
        {
            "aimed at": f"{claim.text}: at least {100 * claim.least:.0f}",
            "found": cell(claim.score),
            "": "met" if claim.is_met else "missed",
        }
        for claim in claims(few)
    ]
    groups = {
        "12 languages": few.foreign,
        "known to the encoder": few.group(True),
        "not known": few.group(False),
        "English": [ENGLISH],
    }
    averages = [
        {"system": SYSTEMS[system]}
        | {name: cell(few.score(system, codes)) for name, codes in groups.items()}
        for system in few.systems
    ]
    every = {"languages that the encoder knows": wide.group(True)}
    every |= {"others": wide.group(False)} if wide.group(False) else {}
    wider = [
        {"system": SYSTEMS[system]}
        | {f"{len(codes)} {name}": cell(wide.score(system, codes)) for name, codes in every.items()}
        for system in wide.systems
    ]
    sections = [
        f"# multilingual-e5-small under SmolLM2-135M, on SIB-200\n\n{where}\n\n{note}",
        f"```\n{table(aims)}\n\n{table(averages)}\n\n{table(wider)}\n```",
        "## The languages named beforehand, three seeds\n\n" + _languages(few),
        "## The first seed, by script\n\n" + _languages(wide),
    ]
    return "\n\n".join(sections) + "\n"


def _languages(answers: Answers) -> str:
    """A row for each language, those of a script together."""
    head = [
        "script",
        "language",
        "the encoder knows it",
        *(SYSTEMS[each] for each in answers.systems),
    ]
    lines = [head, ["---"] * 3 + ["--:"] * len(answers.systems)]
    for script, codes in by_script(answers.languages).items():
        for code in codes:
            scores = [cell(answers.score(system, [code])) for system in answers.systems]
            knows = "yes" if code in answers.known else ""
            lines.append([script, f"{NAMES.get(code, code)} ({code})", knows, *scores])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_script(languages: Sequence[str]) -> dict[str, list[str]]:
    """Script's name -> languages, by their names; the script of most languages first."""
    scripts: dict[str, list[str]] = {}
    for code in sorted(languages, key=lambda code: NAMES.get(code, code)):
        script = code.partition("_")[2]
        scripts.setdefault(SCRIPTS.get(script, script), []).append(code)
    return dict(sorted(scripts.items(), key=lambda item: (-len(item[1]), item[0])))


def plot(few: Answers, wide: Answers, path: Path) -> None:
    """Every language a column, scripts side by side: how often each system is right."""
    from matplotlib.figure import Figure

    order = list(itertools.chain(*by_script(merged_languages(few, wide)).values()))
    rows = np.array_split(order, -(-len(order) // PER_ROW))
    size = (0.24 * max(map(len, rows)) + 1.2, 3.6 * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, codes in zip(axes, rows):
        _plot_row(axis, list(codes), few, wide)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    title = "SIB-200: topic of a sentence, right answers in percent, taught in English alone"
    figure.suptitle(f"{title}\n(bold: English; grey names: the encoder was not trained on it)")
    figure.savefig(path, dpi=110)


def merged_languages(few: Answers, wide: Answers) -> list[str]:
    return sorted({*few.languages, *wide.languages})


def _plot_row(axis, codes: Sequence[str], few: Answers, wide: Answers) -> None:
    """Of each system its first source that has the language: all seeds, or the first."""
    for system, (marker, color) in MARKERS.items():
        points = {}
        for answers in (wide, few):
            if system in answers.systems:
                there = [code for code in codes if code in answers.languages]
                points |= {code: 100 * answers.score(system, [code]).value for code in there}
        places = [codes.index(code) for code in points]
        label = SYSTEMS[system]
        axis.plot(places, list(points.values()), marker, color=color, ms=5, label=label, alpha=0.85)
    axis.axhline(100 * CHANCE, color="grey", ls="--", lw=1, label="guessing")
    # Every script a band, with its name where there is room for it.
    start = 0
    for number, (script, group) in enumerate(_runs(codes)):
        end = start + len(group)
        axis.axvspan(start - 0.5, end - 0.5, color="0.94" if number % 2 else "1.0", zorder=0)
        name = script if len(script) < 3 * len(group) else script[: max(3, 3 * len(group))] + "."
        axis.text(
            (start + end - 1) / 2, 101, name, ha="center", va="bottom", fontsize=7, rotation=0
        )
        start = end
    axis.set_xticks(range(len(codes)), [NAMES.get(code, code) for code in codes], fontsize=7)
    for tick, code in zip(axis.get_xticklabels(), codes):
        tick.set(rotation=90, color="black" if code in wide.known else "0.55")
        tick.set_fontweight("bold" if code == ENGLISH else "normal")
    axis.set(xlim=(-0.7, len(codes) - 0.3), ylim=(0, 100))
    axis.grid(axis="y", alpha=0.3)


def _runs(codes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Neighbours of one script."""
    grouped = itertools.groupby(codes, key=lambda code: code.partition("_")[2])
    return [(SCRIPTS.get(script, script), list(group)) for script, group in grouped]
