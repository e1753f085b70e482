"""Weights sharded over 1 to 4 ranks, and whole on them, against plain PyTorch on one: same packs,
losses, exact resume, no traffic.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtllm_engine.config import dumps
from mtllm_engine.finetune import finetune
from mtllm_engine.train import train
from mtllm_engine.training import memory
from mtllm_engine.training.gpus import GPUS, Cluster
from mtllm_engine.training.traffic import movements
from tests.support.adapters import write_adapters
from tests.support.families import build_llm
from tests.support.machine import ROOT, launch
from tests.support.padded import assert_close, load_llm
from tests.support.planned import CASES, case_config, models_of
from tests.support.stages import (
    ALONE,
    finetuning_config,
    losses,
    rows,
    run_stages,
    write_belebele,
    write_passages,
    write_questions,
    write_topics,
)
from tests.support.tiny import (
    build_config,
    build_corpus,
    build_decoder,
    build_encoder,
    build_lines,
)
from tests.support.zero_worker import (
    ADAPTERS,
    UNDROPPED,
    adapter_digests,
    bf16_config,
    evaluated,
    family_config,
    fp8_config,
    parts_config,
    recorded_keys,
    run,
    sum_config,
)

WORKER = "tests.support.zero_worker"
RESUME = ["stop_and_resume", "resume_other"]
VARIANTS = ["recompute", "bf16"]
DAMAGE = ["damaged_shard", "full_disk"]
TRAFFIC = ["joint_forward", "two_passes", "planned"]
EVERYWHERE = ["ten_steps", "whole", "relay"]
TASK = ["task_runs", "evaluation"]
MEASURED = {"loss", "grad_norm", "accuracy", "validation_accuracy", "validation_fvu"}
FAMILIES = ("gemma3_text", "olmo2", "phi3")
EXTRA = {
    1: ["evaluation", "texts_in_parts", "sums", "families"],
    2: [*VARIANTS, *RESUME, *DAMAGE, *TRAFFIC, "task_runs", "broken_rank"],
    3: [*TASK, "whole_task_runs", "fp8", "texts_in_parts", "sums", "families"],
    4: ["evaluation"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, corpora, plain runs: `ten_steps_0`, one stopped after four steps, and a task's."""
    folder = tmp_path_factory.mktemp("zero")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_decoder(folder / "deep", width=64, layers=40)
    build_corpus(folder / "train", 120)
    cut_corpus(build_corpus(folder / "cut", 60))
    build_lines(folder / "lines", 24)
    build_lines(folder / "lines_held_out", 7, seed=1)
    (folder / "flores" / "dev").mkdir(parents=True)
    for language in ("eng_Latn", "swh_Latn"):
        (folder / "flores" / "dev" / f"{language}.dev").write_text("Yes. No?\nNo! A text.\n")
    plain = {"zero": {"stage": 0}, **ADAPTERS}
    with recorded_keys() as keys:
        train(build_config(folder, run={"dir": str(folder / "ten_steps_0")}, **plain), ALONE)
    (folder / "ten_steps_0_0.json").write_text(json.dumps({"keys": keys}))
    run(build_config(folder, run={"dir": str(folder / "stopped_1")}, **plain), ALONE, stop_at=4)
    write_topics(folder, "eng_Latn", train=16, dev=7)
    counts = {"eng_Latn": 3, "swh_Latn": 7, "nqo_Nkoo": 2}
    for seed, (language, count) in enumerate(counts.items(), start=1):
        write_topics(folder, language, seed=seed, test=count)
    run_stages(folder, "sib200", **UNDROPPED)
    keys = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}
    write_adapters(folder / "other", load_llm(build_config(folder)), **keys)
    learn_choices(folder)
    learn_spans(folder)
    for family in FAMILIES:
        llm = build_llm(folder / "llms" / family, family)
        train(family_config(folder, f"{family}_0", llm, stage=0), ALONE)
    return folder


def learn_choices(folder: Path) -> None:
    write_questions(folder, train=16, dev=7)
    for language in ("eng_Latn", "swh_Latn"):
        write_belebele(folder / "belebele" / f"{language}.jsonl", language)
    run_stages(folder, "belebele", **UNDROPPED)


def learn_spans(folder: Path) -> None:
    """By the LLM and by the stack."""
    files = {"train-v1.1": 16, "dev-v1.1": 7, "xquad.en": 3, "xquad.hi": 9, "xquad.zh": 2}
    for seed, (name, count) in enumerate(files.items()):
        write_passages(folder / "squad" / f"{name}.json", count, seed=seed)
    for reader, name in (("llm", "finetune-xquad"), ("stack", "finetune-xquad-stack")):
        options = {"run": {"dir": str(folder / name)}, **UNDROPPED}
        finetune(finetuning_config(folder, "xquad", reader, **options), ALONE)


def cut_corpus(folder: Path) -> None:
    """Cuts the last shard in the middle of its data."""
    shard = folder / "000002.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


@pytest.fixture(scope="module")
def worlds(folder: Path) -> Path:
    """The folder, once worlds of 1 to 4 ranks have run their scenarios in it."""
    for size, extra in EXTRA.items():
        launch(size, WORKER, folder, *EVERYWHERE, *extra)
    return folder


def results(folder: Path, scenario: str, size: int) -> list[dict]:
    paths = sorted(folder.glob(f"{scenario}_{size}_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def keys_by_step(folder: Path, scenario: str, size: int) -> list[list[str]]:
    """The document keys of each step over all ranks."""
    ranks = [result["keys"] for result in results(folder, scenario, size)]
    return [sorted(sum(step, [])) for step in zip(*ranks, strict=True)]


def test_ranks_run_the_code_of_this_checkout(tmp_path: Path, monkeypatch):
    """Not of another one, which the environment may have installed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    launch(1, WORKER, tmp_path, "code")
    engine, kernels = ROOT / "mtllm_engine" / "train.py", ROOT / "kernels"
    assert results(tmp_path, "code", 1) == [{"engine": str(engine), "kernels": [str(kernels)]}]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["ten_steps", "whole"])
def test_any_number_of_ranks_trains_as_plain_pytorch_does(worlds: Path, layout: str, size: int):
    assert keys_by_step(worlds, layout, size) == keys_by_step(worlds, "ten_steps", 0)
    expected = losses(worlds / "ten_steps_0")
    assert losses(worlds / f"{layout}_{size}") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 10 and len(set(expected)) == 10
    folders = (worlds / "ten_steps_0", worlds / f"{layout}_{size}")
    counts = [sum(row.get("flops", 0) for row in rows(each)) for each in folders]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_trained_is_summed_once_a_step_in_fp32(worlds: Path, size: int):
    """A ring moves 2 (W - 1) / W of these bytes. Beside them are a norm, rank 0's, and sums for the
    log, in fp64."""
    latest = worlds / f"whole_{size}" / "checkpoints" / "latest"
    files = ("adapter_model.safetensors", "projection.safetensors")
    values = [each for name in files for each in load_file(latest / name).values()]
    trained = sum(each.numel() for each in values)
    for result in results(worlds, "whole", size):
        in_fp32 = [numbers for numbers, width, is_float in result["sums"] if is_float and width < 8]
        assert in_fp32 == [trained, 1] * 10
        others = sum(numbers for numbers, width, _ in result["sums"] if width == 8)
        assert others < 10 * 100


def test_worlds_hand_a_run_on_whether_weights_are_whole_or_sharded(worlds: Path):
    """In steps 2, 5 and 8, to one more rank and the other layout."""
    assert losses(worlds / "relay") == pytest.approx(losses(worlds / "ten_steps_0"), rel=1e-5)
    steps = [step for size in range(1, 5) for step in keys_by_step(worlds, "relay", size)]
    assert steps == keys_by_step(worlds, "ten_steps", 0)
    assert [len(keys_by_step(worlds, "relay", size)) for size in range(1, 5)] == [2, 3, 3, 2]


def test_ranks_that_trained_other_numbers_save_nothing(worlds: Path):
    for result in results(worlds, "broken_rank", 2):
        assert "rank 1 has trained other numbers than rank 0" in result["error"]
        assert "\n" not in result["error"]
    assert not list((worlds / "broken" / "checkpoints").glob("step-*"))


def test_activation_checkpointing_changes_nothing(worlds: Path):
    assert losses(worlds / "recompute") == pytest.approx(losses(worlds / "ten_steps_2"), rel=1e-5)


def test_bf16_base_drifts_by_rounding_only(worlds: Path):
    """Gradients are reduced in fp32: by less than bf16's own resolution, 2^-8."""
    run(bf16_config(worlds, "bf16_0", stage=0), ALONE)
    assert losses(worlds / "bf16_2") == pytest.approx(losses(worlds / "bf16_0"), rel=2**-10)


def test_three_ranks_round_gradients_to_fp8_as_one_does(worlds: Path):
    """No factor of three is in them, which averaging over ranks would bring."""
    train(fp8_config(worlds, "fp8_0", stage=0), ALONE)
    assert losses(worlds / "fp8_3") == pytest.approx(losses(worlds / "fp8_0"), rel=1e-5)


def test_steps_have_several_micro_batches(worlds: Path):
    """Otherwise the tests here would not see gradient accumulation."""
    tokens = [
        (row["student_tokens"], row["teacher_tokens"]) for row in rows(worlds / "ten_steps_0")
    ]
    assert min(map(max, tokens)) > 2 * 160


def test_stop_and_resume_is_bitwise_on_the_same_world(worlds: Path):
    assert losses(worlds / "resumed_2") == losses(worlds / "ten_steps_2")
    assert keys_by_step(worlds, "stop_and_resume", 2) == keys_by_step(worlds, "ten_steps", 2)
    states = [final_state(worlds / name) for name in ("resumed_2", "ten_steps_2")]
    assert states[0] == states[1]


def final_state(run_folder: Path) -> dict:
    record = json.loads((run_folder / "checkpoints" / "latest" / "state.json").read_text())
    return {"files": record["files"], "lanes": record["lanes"]}


def test_killed_between_checkpoints_and_continued(worlds: Path):
    """The command users type, killed after step 4 or later, with checkpoints every 3 steps."""
    options = {"run": {"dir": str(worlds / "killed")}, "checkpoint": {"every": 3}}
    path = worlds / "killed.toml"
    path.write_text(dumps(build_config(worlds, **options, **ADAPTERS)))
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", str(path), "--gpus", "2"]
    while not was_killed_in_mid_run(command, worlds / "killed"):
        shutil.rmtree(worlds / "killed")
    subprocess.run(command, check=True)
    assert losses(worlds / "killed") == losses(worlds / "ten_steps_2")
    assert [row["step"] for row in rows(worlds / "killed")] == list(range(1, 11))


def was_killed_in_mid_run(command: Sequence[str], run_folder: Path) -> bool:
    """Kills a run of ten steps and all its ranks; on a busy machine that may come too late."""
    launcher = subprocess.Popen(command, start_new_session=True)
    while launcher.poll() is None and last_step(run_folder) < 4:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.wait() in (0, -signal.SIGKILL)
    return launcher.returncode != 0 and last_step(run_folder) < 10


def last_step(run_folder: Path) -> int:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_one_rank_continues_two(worlds: Path):
    target = worlds / "two_to_one"
    shutil.copytree(worlds / "stopped_2", target, symlinks=True)
    options = {"run": {"dir": str(target)}, "zero": {"stage": 0}}
    steps = run(build_config(worlds, **options, **ADAPTERS), ALONE)
    assert losses(target) == pytest.approx(losses(worlds / "ten_steps_2"), rel=1e-5)
    assert [sorted(step) for step in steps] == keys_by_step(worlds, "ten_steps", 2)[4:]


def test_two_ranks_continue_one(worlds: Path):
    assert losses(worlds / "stopped_1") == pytest.approx(losses(worlds / "ten_steps_0"), rel=1e-5)
    assert keys_by_step(worlds, "resume_other", 2) == keys_by_step(worlds, "ten_steps", 0)[4:]


def test_damaged_shard_stops_every_rank_with_one_line_or_is_counted(worlds: Path):
    for result in results(worlds, "damaged_shard", 2):
        assert "000002.tar is cut" in result["error"] and "\n" not in result["error"]
        assert result["skipped"] > 0


def test_full_disk_keeps_the_checkpoint_before(worlds: Path):
    for result in results(worlds, "full_disk", 2):
        assert "step-00000004" in result["error"]
        assert "earlier checkpoints are intact" in result["error"]
    saved = sorted(path.name for path in (worlds / "full" / "checkpoints").iterdir())
    assert saved == ["latest", "step-00000002"]


def test_joint_layers_are_gathered_once_forward_and_once_backward(worlds: Path):
    for result in results(worlds, "joint_forward", 2):
        assert max(result["ratios"]) <= 2.05
        assert result["blocking"] == 0 and result["invalidations"] == 0
        assert set(result["pinned"]) == {0}


def test_two_passes_would_gather_three_times(worlds: Path):
    for result in results(worlds, "two_passes", 2):
        assert min(result["ratios"]) >= 2.8


@pytest.mark.parametrize("ranks", ["2_ranks", "3_ranks", "3_whole"])
@pytest.mark.parametrize("step", ["finetune", "stage2"])
def test_any_number_of_ranks_learns_a_task_as_plain_pytorch_does(
    worlds: Path, step: str, ranks: str
):
    """Stage 2 learns from states that these ranks stored, plain PyTorch from the live teacher."""
    plain, parallel = rows(worlds / f"{step}-sib200"), rows(worlds / f"{step}_{ranks}")
    assert len(parallel) == len(plain) == 5  # validation, three steps, validation
    for before, after in zip(plain, parallel):
        for key in before.keys() & MEASURED:
            assert after[key] == pytest.approx(before[key], rel=1e-5), key


def test_a_rank_without_documents_took_part(worlds: Path):
    """Or the tests of three ranks would not see what it runs: a token that brings stored states."""
    counts = [[len(step) for step in result["keys"]] for result in results(worlds, "task_runs", 3)]
    assert [sum(step) for step in zip(*counts)] == [8, 8, 8]
    assert min(map(min, counts)) < max(map(max, counts))


@pytest.mark.parametrize("end", ["", "_stored"])
def test_any_number_of_ranks_reads_texts_in_parts_as_plain_pytorch_does(worlds: Path, end: str):
    """Which learns from a live teacher, also where they learn from the states that they stored."""
    train(parts_config(worlds, f"parts_0{end}", aligns=not end, stage=0), ALONE)
    plain = rows(worlds / f"parts_0{end}")
    for size in (1, 3):
        sharded = rows(worlds / f"parts_{size}{end}")
        # Validation, four steps, validation; the probe is beside a live teacher.
        assert len(sharded) == len(plain) == (6 if end else 8)
        for before, after in zip(plain, sharded):
            for key in before.keys() & {*MEASURED, "probe_fvu", "probe_cosine"}:
                assert after[key] == pytest.approx(before[key], rel=1e-5), key


@pytest.fixture(scope="module", params=["all", "first"])
def plain_sum(request, worlds: Path) -> tuple[str, dict[str, str]]:
    """What learns of a sum, and what of it plain PyTorch reads; it has then learned from it."""
    config = sum_config(worlds, f"sum_{request.param}_0", request.param, stage=0)
    train(config, ALONE)
    return request.param, adapter_digests(config, ALONE)


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_reads_and_trains_a_sum_as_plain_pytorch_does(
    worlds: Path, plain_sum: tuple[str, dict[str, str]], size: int
):
    """The same bits to begin with; the same losses; the same sum in the end, to rounding."""
    learned, expected = plain_sum
    assert any(".frozen_" in name for name in expected) == (learned == "first")
    for digests in results(worlds, "sums", size):
        assert digests[learned] == expected
    plain, sharded = (worlds / f"sum_{learned}_{ranks}" for ranks in (0, size))
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    before, after = (load_file(adapters_in(run_folder)) for run_folder in (plain, sharded))
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        assert_close(after[name], matrix, name)


def adapters_in(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "latest" / "adapter_model.safetensors"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_read_every_byte_once(worlds: Path, family: str, size: int):
    """Of an LLM: its head, which nothing asks for, never."""
    path = worlds / "llms" / family / "model.safetensors"
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for result in results(worlds, "families", size):
        for file, name, start, stop in result[family]:
            if file == str(path):
                ranges[name].append((start, stop))
    sizes = {name: each.numel() for name, each in load_file(path).items()}
    sizes.pop("lm_head.weight", None)
    assert ranges.keys() == sizes.keys()
    for name, read in ranges.items():
        starts, stops = zip(*sorted(read))
        assert (*starts[1:], sizes[name]) == stops and starts[0] == 0, name


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_trains_any_family_as_plain_pytorch_does(
    worlds: Path, family: str, size: int
):
    expected = losses(worlds / f"{family}_0")
    assert losses(worlds / f"{family}_{size}") == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3


@pytest.fixture(scope="module")
def plain_scores(worlds: Path) -> dict[str, dict]:
    return evaluated(worlds, "evaluate_0", ALONE, stage=0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_any_number_of_ranks_scores_every_document_once(
    worlds: Path, plain_scores: dict[str, dict], size: int
):
    """In order, on every rank alike, and as plain PyTorch does; the same predictions are saved."""
    for recorded in results(worlds, "evaluation", size):
        assert recorded.keys() == plain_scores.keys()
        assert len(recorded) == (3 + 2 + 2) + 2 * 2 + 2 * 3
        for corpus, scores in recorded.items():
            expected = plain_scores[corpus]
            assert scores["keys"] == expected["keys"] and scores["labels"] == expected["labels"]
            if "/xquad/" in corpus:
                assert scores["scores"] == expected["scores"]
            name = "states" if "/xquad/" in corpus else "scores"
            difference = torch.tensor(scores[name]) - torch.tensor(expected[name])
            assert difference.abs().max() <= 1e-5 * torch.tensor(expected[name]).abs().max()
    folders = [worlds / name / "results" for name in (f"evaluate_{size}_ranks", "evaluate_0")]
    saved = [
        {path.relative_to(folder): answers(path) for path in folder.rglob("*.jsonl")}
        for folder in folders
    ]
    # 2 say nothing, 1 is a cache of translations.
    assert saved[0] == saved[1] and len(saved[0]) == 7 + 4 + 6 + 2 + 1


def test_ranks_with_whole_weights_score_every_document_once(
    worlds: Path, plain_scores: dict[str, dict]
):
    for result in results(worlds, "whole_task_runs", 3):
        recorded = result["scores"]
        assert len(recorded) == 3 + 2 + 2
        for corpus, scores in recorded.items():
            expected = plain_scores[corpus]
            assert scores["keys"] == expected["keys"] and scores["labels"] == expected["labels"]
            difference = torch.tensor(scores["scores"]) - torch.tensor(expected["scores"])
            largest = torch.tensor(expected["scores"]).abs().max()
            assert difference.abs().max() <= 1e-5 * largest


def answers(path: Path) -> list[dict]:
    """Predictions without their header; translations without how long they took."""
    lines = map(json.loads, path.read_text().splitlines()[1:])
    timed = ("wall_s", "crc32")  # the latter is a checksum of the former, too
    return [{key: value for key, value in row.items() if key not in timed} for row in lines]


@pytest.mark.parametrize("case", CASES)
def test_ranks_send_and_hold_what_the_plan_says(worlds: Path, case: str):
    config = case_config(worlds, case)
    models, cluster = models_of(config), Cluster(gpu=GPUS["h100"], gpus=2)
    planned = {row.name: row.bytes for row in memory.rows(config, models, 2)}
    for result in results(worlds, "planned", 2):
        seen = result[case]
        moved = movements(config, models, cluster, seen["micro_batches"])
        for kind in ("gathered", "reduced"):
            assert sum(each.bytes for each in moved if each.kind == kind) == seen[kind], kind
        assert planned["frozen weights"] == seen["frozen"]
        assert planned["small ones kept whole"] == seen["whole"]
        # The update has the gradients once more.
        assert (
            planned["trained"] * (memory.ZERO_TRAINED - 4) == seen["trained"] * memory.ZERO_TRAINED
        )
