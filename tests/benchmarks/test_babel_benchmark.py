"""What the Babel benchmark makes of predictions in several lands, and claims met or missed."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import babel as benchmark
from mtllm_engine.babel.land import CATEGORIES, SKETCHES
from mtllm_engine.evaluation.predictions import Predictions, save

CODES = ("eng_Latn", *(sketch.code for sketch in SKETCHES))
EXAMPLES = 140
RIGHT = {  # share of right answers: of all languages, of low-resource ones
    ("whole", "llm"): (0.15, 0.15),
    ("whole", "stack"): (0.9, 0.8),
    ("whole", "translate_test"): (0.85, 0.6),
    ("stage2", "stage-2-alone"): (0.3, 0.3),
    ("aligned-0", "long-aligned"): (0.75, 0.75),
    ("aligned-1", "long-aligned"): (0.65, 0.65),
    ("independent-0", "long-independent"): (0.6, 0.6),
    ("independent-1", "long-independent"): (0.8, 0.8),
}


def predict(work: Path, seed: int, changed: dict[tuple[str, str], tuple[float, float]]) -> None:
    """Writes one land's predictions; the labels are its own."""
    labels_N = np.random.default_rng(seed).integers(len(CATEGORIES), size=EXAMPLES)
    for (folder, system), shares in (RIGHT | changed).items():
        for code in CODES:
            right = round(shares[code in benchmark.LOW] * EXAMPLES)
            answers_N = np.where(
                np.arange(EXAMPLES) < right, labels_N, (labels_N + 1) % len(CATEGORIES)
            )
            columns = {
                "keys": [str(n) for n in range(EXAMPLES)],
                "labels": labels_N,
                "predictions": answers_N,
            }
            item = Predictions(
                system=system,
                dataset="sib200",
                language=code,
                seed=benchmark.VARIANTS[folder].seed,
                metric="accuracy",
                num_classes=len(CATEGORIES),
                **columns,
            )
            save(work / f"seed-{seed}" / folder / "results", item)
    for number, cut in itertools.product(benchmark.TRAININGS, benchmark.CUTS):
        stage1 = work / f"seed-{seed}" / f"{cut}-{number}" / "stage1"
        stage1.mkdir()
        fvu = {"aligned": 0.5, "independent": 0.6 + number / 10}[cut]
        rows = [
            {"step": step, "validation_fvu": fvu + 1 - step, "validation_documents": 9}
            for step in (0, 1)
        ]
        (stage1 / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_claims_are_over_the_examples_of_all_lands(tmp_path: Path):
    predict(tmp_path, 1, {})
    predict(tmp_path, 2, {("whole", "stack"): (0.8, 0.8)})
    predictions = benchmark.gather([1, 2], tmp_path)
    assert all(len(item.keys) == len(set(item.keys)) == 2 * EXAMPLES for item in predictions)
    claims = {claim.text: claim for claim in benchmark.claims(predictions)}
    assert all(claim.is_met for claim in claims.values())
    high, low = (0.9 + 0.8) / 2, 0.8
    value = claims["stack, all foreign languages"].score.value
    assert value == pytest.approx((4 * high + 2 * low) / 6)
    gain = next(claim for text, claim in claims.items() if "translate-test, low-resource" in text)
    assert gain.score.value == pytest.approx(0.2) and gain.surely
    shown = benchmark.report(
        predictions,
        {seed: benchmark.gather([seed], tmp_path) for seed in (1, 2)},
        benchmark.truncation([1, 2], tmp_path),
        {"device": "D", "commit": "C", "command": "X"},
    )
    assert "missed" not in shown and shown.count(" met\n") == len(claims)


def test_trainings_are_compared_pair_by_pair(tmp_path: Path):
    for seed in (1, 2):
        predict(tmp_path, seed, {})
    *rows, last = benchmark.truncation([1, 2], tmp_path)
    assert [row["land, training"] for row in rows] == ["1, 0", "1, 1", "2, 0", "2, 1"]
    assert [list(row.values())[1:] for row in rows] == 2 * [
        ["75.0", "60.0", "0.5000", "0.6000"],
        ["65.0", "80.0", "0.5000", "0.7000"],
    ]
    errors = [np.std(2 * gains, ddof=1) / 2 for gains in ([15, -15], [-0.1, -0.2])]
    assert last["aligned"] == f"+0.0 ± {errors[0]:.1f}"
    assert last["aligned, FVU"] == f"-0.1500 ± {errors[1]:.4f}"


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({("whole", "stack"): (0.6, 0.8)}, {"stack, all foreign", "stack - translate-test"}),
        ({("whole", "llm"): (0.5, 0.5)}, {"stack - chance"}),
        (
            {("stage2", "stage-2-alone"): (0.3, 0.79)},
            {"stages 1 and 2 - stage 2 alone, low-resource"},
        ),
        ({("aligned-1", "long-aligned"): (0.64, 0.65)}, {"long documents"}),
    ],
)
def test_a_miss_is_a_miss(changed: dict, missed: set[str], tmp_path: Path):
    predict(tmp_path, 1, changed)
    claims = benchmark.claims(benchmark.gather([1], tmp_path))
    texts = {claim.text for claim in claims if not claim.is_met}
    assert all(any(text.startswith(start) for text in texts) for start in missed)
    assert all(any(text.startswith(start) for start in missed) for text in texts)


def test_seeds_are_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--seeds", "7;8"])
    assert "write whole numbers with commas, such as 10,11,12, not 7;8" in capsys.readouterr().err
