"""What `make real` asks for and what it reports, without its models; the run itself is a proof."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import real
from benchmarks.real_report import ALONE, CHANCE, Answers, by_script, claims, gather
from mtllm_engine import config as configs
from mtllm_engine.evaluation.predictions import Predictions, save
from mtllm_engine.languages import ENGLISH
from tests.support.machine import ROOT
from tests.support.stages import write_topics

WIKI = """
 = Lobster =

 The lobster is a large crustacean , with a length of up to 60 centimetres ( 24 in ) . It weighs \
0 @.@ 7 – 2 @.@ 2 kg and does n't walk well on land .
 A <unk> lobster is called " red " by cooks ; the claw @-@ like arms are the lobster 's own .
 The " claw @-@ like " arms are the lobster 's own , all 1 @,@ 000 of them .
"""


def test_wikitext_reads_as_it_was_written():
    assert list(real.clean(WIKI)) == [
        "The lobster is a large crustacean, with a length of up to 60 centimetres (24 in).",
        "It weighs 0.7 – 2.2 kg and doesn't walk well on land.",
        'The "claw-like" arms are the lobster\'s own, all 1,000 of them.',
    ]


def test_what_is_missing_is_one_line_with_the_fix(tmp_path: Path, capsys):
    def told(*words: str) -> str:
        assert real.main([*words, "--work", str(tmp_path / "work")]) == 1
        return capsys.readouterr().err

    assert "has no SIB-200; DATA is a clone of it: git clone" in told(str(tmp_path))
    write_topics(tmp_path / "sib", ENGLISH, train=3)
    (tmp_path / "sib" / "topics").rename(tmp_path / "sib-200")
    assert "has no wikitext-2, which stage 1 would read; name a file" in told(str(tmp_path))
    assert "there is no file" in told(str(tmp_path), "--text", str(tmp_path / "none.txt"))
    assert not (tmp_path / "work").exists()


def test_the_recipe_and_its_twin_differ_in_stage_1_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    whole, alone = real.recipes(Path("runs/real"), 2)
    names = [job.name for job in whole.jobs]
    assert names == ["stage1", *(f"{step}-{seed}" for seed in (0, 1) for step in real.STEPS)]
    assert [job.name for job in alone.jobs] == names[1:]
    for ours, theirs in zip(whole.jobs[1:], alone.jobs):
        before, after = configs.flatten(ours.config), configs.flatten(theirs.config)
        changed = {key for key in before if before[key] != after[key]} - {"run.dir"}
        allowed = {"model.init_from", "model.teacher", "evaluate.systems", "evaluate.stack_name"}
        allowed |= {"evaluate.results", "evaluate.stage1", "lora.rank", "lora.alpha"}
        assert changed <= allowed | {"lora.target_modules", "task.train", "task.validation"}
        if ours.module.endswith("finetune"):
            assert not changed


def test_scores_are_means_and_their_intervals_hold_the_truth():
    """Of many drawn sets of languages and examples, 95 % of the intervals hold the mean of all."""
    random = np.random.default_rng(0)
    hits, rounds = 0, 60
    for _ in range(rounds):
        ease_L, ease_N = random.normal(size=(12, 1)), random.normal(size=150)
        right = (random.normal(size=(12, 150)) + ease_L + ease_N > 0).astype(float)
        languages = tuple(f"l{number:02}" for number in range(12))
        answers = Answers(
            systems=("stack",), languages=languages, right=right[None], known=frozenset()
        )
        score = answers.score("stack", languages)
        assert score.value == pytest.approx(right.mean())
        hits += score.low <= 0.5 <= score.high
    assert hits / rounds >= 0.85


def test_claims_are_of_foreign_languages_and_the_english_teacher(tmp_path: Path):
    shares = {"llm": 0.3, "encoder": 0.7, ALONE: 0.4, "sum": 0.5, "stack": 0.6}
    labels = np.zeros(10, np.int64)
    for system, share in shares.items():
        for code in (ENGLISH, "deu_Latn", "yor_Latn"):
            share_here = 0.9 if (system, code) == ("llm", ENGLISH) else share
            predictions = (np.arange(10) >= round(10 * share_here)).astype(np.int64)
            item = Predictions(
                system=system,
                dataset="sib200",
                language=code,
                seed=0,
                metric="accuracy",
                keys=list(map(str, range(10))),
                labels=labels,
                predictions=predictions,
                num_classes=7,
            )
            save(tmp_path, item)
    answers = gather([tmp_path], frozenset([ENGLISH, "deu_Latn"]))
    beyond, share, alone = claims(answers)
    assert beyond.score.value == pytest.approx(0.3) and beyond.is_met
    assert share.score.value == pytest.approx((0.6 - CHANCE) / (0.9 - CHANCE)) and not share.is_met
    assert alone.score.value == pytest.approx(0.2)


def test_scripts_stand_by_their_size():
    found = by_script(["rus_Cyrl", "eng_Latn", "deu_Latn", "tha_Thai"])
    assert found == {
        "Latin": ["eng_Latn", "deu_Latn"],
        "Cyrillic": ["rus_Cyrl"],
        "Thai": ["tha_Thai"],
    }
