"""What the Babel benchmarks make of predictions in several lands, and claims met or missed."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks import babel as benchmark
from benchmarks import parts, truncation
from benchmarks.babel import ALONE, FROM_STAGE1, FROM_SUM
from mtllm_engine import recipe
from mtllm_engine.babel.land import CATEGORIES, SKETCHES
from mtllm_engine.evaluation.predictions import Predictions, save

CODES = ("eng_Latn", *(sketch.code for sketch in SKETCHES))
EXAMPLES = 140
RIGHT = {  # share of right answers: of all languages, of low-resource ones
    "llm": (0.15, 0.15),
    "translate_test": (0.85, 0.6),
    "sum": (0.89, 0.8),
    FROM_STAGE1: (0.86, 0.8),
    FROM_SUM: (0.9, 0.8),
    ALONE: (0.3, 0.3),
}
FLOPS = {FROM_STAGE1: 3e12, FROM_SUM: 2e12}
Shares = Mapping[str, tuple[float, float]]


def predict(results: Path, land: int, system: str, shares: tuple[float, float], **about) -> None:
    """One system's predictions in one land; the labels are the land's."""
    labels_N = np.random.default_rng(land).integers(len(CATEGORIES), size=EXAMPLES)
    for code in CODES:
        right = round(shares[code in benchmark.LOW] * EXAMPLES)
        is_right_N = np.arange(EXAMPLES) < right
        item = Predictions(
            system=system,
            language=code,
            metric="accuracy",
            num_classes=len(CATEGORIES),
            keys=[str(n) for n in range(EXAMPLES)],
            labels=labels_N,
            predictions=np.where(is_right_N, labels_N, (labels_N + 1) % len(CATEGORIES)),
            **{"dataset": "sib200", "seed": 0, **about},
        )
        save(results, item)


def predict_all(work: Path, seed: int, changed: Mapping[str, Shares]) -> None:
    """Every system's in one land. Args: changed: of a task."""
    for name, task in benchmark.TASKS.items():
        for system, shares in {**RIGHT, **changed.get(name, {})}.items():
            stack = system if system in benchmark.PROOF.variants else FROM_STAGE1
            results = work / f"seed-{seed}" / f"{name}-{stack}" / "results"
            predict(results, seed, system, shares, dataset=task.test, flops=FLOPS.get(system, 1e12))


def claims_of(task: str, work: Path, seeds: list[int]) -> dict[str, benchmark.Claim]:
    found = benchmark.claims(task, benchmark.PROOF.gather(task, seeds, work))
    return {claim.text: claim for claim in found}


def test_claims_are_over_the_examples_of_all_lands(tmp_path: Path):
    predict_all(tmp_path, 1, {})
    predict_all(tmp_path, 2, {"sib200": {FROM_SUM: (0.88, 0.8)}})
    predictions = benchmark.PROOF.gather("sib200", [1, 2], tmp_path)
    assert all(len(item.keys) == len(set(item.keys)) == 2 * EXAMPLES for item in predictions)
    claims = claims_of("sib200", tmp_path, [1, 2])
    assert all(claim.is_met for claim in claims.values())
    value = claims[f"{FROM_SUM}, all foreign languages"].score.value
    rights = [round(share * EXAMPLES) / EXAMPLES for share in (0.9, 0.88, 0.8)]
    assert value == pytest.approx((4 * np.mean(rights[:2]) + 2 * rights[2]) / 6)
    gain = next(claim for text, claim in claims.items() if "translate_test, low-resource" in text)
    assert gain.score.value == pytest.approx(0.2) and gain.surely


def test_the_report_has_every_task_seed_and_system(tmp_path: Path):
    for seed in (1, 2):
        predict_all(tmp_path, seed, {})
    origin = {"device": "D", "commit": "C", "command": "X"}
    out = tmp_path / "report.md"
    assert benchmark.PROOF.write([1, 2], tmp_path, out, origin)
    shown = out.read_text()
    assert "missed" not in shown and shown.count(" met\n") == 8 + 2
    for task, dataset in (("sib200", "sib200"), ("nli", "xnli")):
        assert f"## {dataset}\n" in shown and (tmp_path / f"report-{task}.png").is_file()
    assert all(shown.count(f"\n{system} ") >= 2 for system in RIGHT) and "3e+12" in shown


@pytest.mark.parametrize(
    ("task", "changed", "missed"),
    [
        ("sib200", {"sum": (0.7, 0.6)}, {"sum - translate_test", f"sum - {FROM_SUM}"}),
        ("sib200", {"llm": (0.5, 0.5)}, {f"{FROM_SUM} - chance"}),
        ("sib200", {ALONE: (0.95, 0.95)}, {f"{FROM_SUM} - {ALONE}"}),
        ("sib200", {FROM_SUM: (0.86, 0.8)}, {f"{FROM_SUM} - {FROM_STAGE1}"}),
        ("nli", {FROM_SUM: (0.6, 0.6)}, {f"{FROM_SUM} - {FROM_STAGE1}"}),
        (
            "nli",
            {FROM_SUM: (0.7, 0.6), FROM_STAGE1: (0.6, 0.6)},
            {f"{FROM_SUM} - translate_test"},
        ),
    ],
)
def test_a_miss_is_a_miss(task: str, changed: Shares, missed: set[str], tmp_path: Path):
    predict_all(tmp_path, 1, {task: changed})
    claims = claims_of(task, tmp_path, [1])
    texts = {text.partition(",")[0] for text, claim in claims.items() if not claim.is_met}
    assert texts == {text.partition(",")[0] for text in missed}


def test_parts_are_set_beside_whole_texts(tmp_path: Path):
    """Each with its own sum; English is not abroad."""
    right = {"llm": (0.95, 0.95), "translate_test": (0.6, 0.6)}
    stacks = {parts.WHOLE: 0.5, parts.LINES: 0.65, parts.SENTENCES: 0.45}
    stacks |= {parts.LONG: 0.55, parts.PAIRS: 0.6}
    for name, task in benchmark.TASKS.items():
        for stack, share in stacks.items():
            results = tmp_path / "seed-1" / f"{name}-{stack}" / "results"
            systems = {stack: (share, share)}
            systems |= {"sum": (share / 2,) * 2} if parts.PROOF.variants[stack].sum else {}
            for system, shares in {**systems, **(right if stack == parts.WHOLE else {})}.items():
                predict(results, 1, system, shares, dataset=task.test)
    predictions = parts.PROOF.gather("nli", [1], tmp_path)
    sums = {"sum-whole", "sum-lines", "sum-sentences"}
    assert {item.system for item in predictions} == {*stacks, *right, *sums}
    found = {claim.text: claim for claim in parts.claims("nli", predictions)}
    met = {text: claim.is_met for text, claim in found.items()}
    assert met == {
        f"{parts.LINES} - {parts.WHOLE}": True,
        f"{parts.SENTENCES} - {parts.WHOLE}": False,
        f"{parts.LONG} - {parts.WHOLE}": True,
        f"{parts.PAIRS} - {parts.WHOLE}": True,
        f"{parts.LINES} - translate_test": True,
        f"{parts.LINES} - llm, in English": False,
    }
    english = found[f"{parts.LINES} - llm, in English"].score.value
    assert english == pytest.approx(0.65 - 0.95)


CUT_RIGHT = {"aligned": (0.75, 0.65), "independent": (0.6, 0.8)}  # by training


def cut(work: Path, seed: int) -> None:
    """One land's trainings on long documents."""
    for number, way in itertools.product(truncation.TRAININGS, truncation.CUTS):
        run = work / f"seed-{seed}" / f"{way}-{number}"
        predict(run / "results", seed, "stack", 2 * (CUT_RIGHT[way][number],), seed=number)
        (run / "stage1").mkdir()
        fvu = {"aligned": 0.5, "independent": 0.6 + number / 10}[way]
        rows = [
            {"step": step, "validation_fvu": fvu + 1 - step, "validation_documents": 9}
            for step in (0, 1)
        ]
        (run / "stage1" / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def test_trainings_are_compared_pair_by_pair(tmp_path: Path):
    for seed in (1, 2):
        cut(tmp_path, seed)
    (*rows, last), gain = truncation.compared([1, 2], tmp_path)
    assert [row["land, training"] for row in rows] == ["1, 0", "1, 1", "2, 0", "2, 1"]
    assert [list(row.values())[1:] for row in rows] == 2 * [
        ["75.0", "60.0", "0.5000", "0.6000"],
        ["65.0", "80.0", "0.5000", "0.7000"],
    ]
    errors = [np.std(2 * gains, ddof=1) / 2 for gains in ([15, -15], [-0.1, -0.2])]
    assert last["aligned"] == f"+0.0 ± {errors[0]:.1f}" and gain == pytest.approx(0)
    assert last["aligned, FVU"] == f"-0.1500 ± {errors[1]:.4f}"
    origin = {"device": "D", "commit": "C", "command": "X"}
    truncation.write([1, 2], tmp_path, tmp_path / "cuts.md", origin)
    assert "1, 0" in (tmp_path / "cuts.md").read_text()


def test_seeds_are_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--seeds", "7;8"])
    assert "write whole numbers with commas, such as 20,21,22, not 7;8" in capsys.readouterr().err


def test_every_variant_is_a_recipe_that_can_be_read(tmp_path: Path):
    """Of both proofs: pairs are every other document of the second task alone."""
    for proof in (benchmark.PROOF, parts.PROOF):
        for stack, variant in proof.variants.items():
            for task in variant.tasks:
                overrides = proof._overrides(tmp_path / "land", task, stack)
                jobs = {
                    job.name: job.config for job in recipe.load(benchmark.RECIPE, overrides).jobs
                }
                assert jobs["evaluate-0"].evaluate.stack_name == stack
                data = jobs["stage2-0"].data
                assert data.mixture == ((1.0, 1.0) if data.pairs else ())
                assert bool(data.train) == (task == "sib200" or bool(data.pairs))
                assert jobs["stage2-0"].optim.steps in (variant.steps or 263, 300, 1106, 1260)
