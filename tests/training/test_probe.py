"""The cross-lingual probe: figures by brute force, every line once on any number of ranks, one line
per mistake.
"""

import base64
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from mtllm_engine.config import Config, dumps
from mtllm_engine.data.annotations import NO_ANNOTATIONS
from mtllm_engine.data.batch import Document, Totals, collate
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.train import train
from mtllm_engine.training.engine import build_engine, shard
from mtllm_engine.training.probe import Agreement, average, measure, open_probe
from mtllm_engine.training.report import language_label, read_metrics, read_probe
from tests.support.machine import launch
from tests.support.stages import losses, rows
from tests.support.tiny import (
    build_config,
    build_corpus,
    build_decoder,
    build_encoder,
    build_world,
    texts,
)

WORLD = build_world()
NUM_LINES = 9
FILES = {
    "eng_Latn.dev": 0,
    "swh_Latn.dev": 1,
    "dev.quy_Latn": 2,
    "arb_Latn.dev": 3,  # which has no token
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 60)
    build_corpus(folder / "validation", 20, seed=1)
    write_lines(folder / "flores")
    return folder


def write_lines(folder: Path) -> Path:
    (folder / "dev").mkdir(parents=True)
    for name, seed in FILES.items():
        (folder / "dev" / name).write_text("\n".join(lines_of(seed)) + "\n")
    (folder / "dev" / "metadata_dev.tsv").write_text("no lines\n")
    return folder


def lines_of(seed: int) -> list[str]:
    """Of two sentences; none is cut."""
    return [f"Yes. A {line}" for line in texts(NUM_LINES, seed=10 + seed, longest=8)]


def configure(folder: Path, *, probe: dict | None = None, **sections) -> Config:
    probe = {"folder": str(folder / "flores")} | (probe or {})
    return build_config(folder, **{"probe": probe, "zero": {"stage": 0}} | sections)


def open_with(config: Config):
    return open_probe(config, WORLD, build_tokenizer(config, build_stack(config)[0]))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99), st.floats(0, 2))
def test_figures_by_brute_force(count: int, width: int, seed: int, error: float):
    generator = np.random.default_rng(seed)
    teacher_LD = generator.normal(size=(count, width)) + 1
    student_LD = teacher_LD + error * generator.normal(size=(count, width))
    agreement = measure(torch.tensor(student_LD), torch.tensor(teacher_LD))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert agreement.cosine == pytest.approx(
        np.mean([cosine(*pair) for pair in zip(student_LD, teacher_LD)])
    )
    hits = [
        max(range(count), key=lambda j: cosine(s, teacher_LD[j])) == i
        for i, s in enumerate(student_LD)
    ]
    if width > 1:  # cosines of numbers are 1 or -1, and rounding decides among them
        assert agreement.retrieval == pytest.approx(np.mean(hits))
    variance = np.square(teacher_LD - teacher_LD.mean(0)).sum()
    if count > 1:
        assert agreement.fvu == pytest.approx(np.square(student_LD - teacher_LD).sum() / variance)
    else:
        assert math.isnan(agreement.fvu)


def test_the_mean_leaves_english_out():
    each = {
        name: Agreement(fvu=v, cosine=v, retrieval=v)
        for name, v in (("eng_Latn", 9), ("swh_Latn", 1), ("x", 2))
    }
    assert asdict(average(each)) == {"fvu": 1.5, "cosine": 1.5, "retrieval": 1.5}


@pytest.mark.parametrize("parts", ["whole", "sentences"])
def test_student_reads_the_foreign_line_and_teacher_the_english_one(folder: Path, parts: str):
    config = configure(
        folder,
        probe={"languages": ["swh_Latn", "quy_Latn"], "lines": 5},
        data={"parts": parts},
    )
    stack, weights = build_stack(config)
    tokenizer = build_tokenizer(config, stack)
    engine = build_engine(config, shard(stack, weights, config, WORLD), WORLD)
    probe = open_probe(config, WORLD, tokenizer)
    agreements = probe(engine)
    assert list(agreements) == ["swh_Latn", "quy_Latn"] and probe.num_lines == 5
    llm = LlamaForCausalLM.from_pretrained(folder / "decoder").model.eval()
    for language, seed in (("swh_Latn", 1), ("quy_Latn", 2)):
        students, teachers = [], []
        for foreign, english in list(zip(lines_of(seed), lines_of(0)))[:5]:
            student, _ = tokenizer.example(foreign, language, NO_ANNOTATIONS)
            _, teacher_ids_T = tokenizer(english, "eng_Latn")
            student_ids_S, parts_Q2 = student.ids_S, student.parts_Q2
            assert parts == "whole" if parts_Q2 is None else len(parts_Q2) > 1
            assert max(len(student_ids_S), len(teacher_ids_T)) < config.data.max_length
            assert student_ids_S[0] == tokenizer.encoder.convert_tokens_to_ids(language)
            ids = {"student_ids_S": student_ids_S, "teacher_ids_T": teacher_ids_T}
            document = Document(key="a", seed=0, **ids, parts_Q2=parts_Q2)
            batch = collate([document], step_seed=0, device=WORLD.device)
            ids_BL = torch.tensor(teacher_ids_T[None]).long()
            seen_B1LL = torch.zeros(1, 1, *2 * ids_BL.shape[1:])  # bidirectional: no mask
            with engine.evaluating():
                students.append(engine(batch, Totals(1, 1)).outputs.student_PD[0])
                states_BLD = llm(ids_BL, attention_mask=seen_B1LL).last_hidden_state
            teachers.append(states_BLD[0].mean(0))
        expected = asdict(measure(torch.stack(students), torch.stack(teachers)))
        assert asdict(agreements[language]) == pytest.approx(expected, rel=1e-4)


def test_two_ranks_measure_as_one_does_and_start_from_the_same_projection(folder: Path, capfd):
    """Lines that two ranks cannot share evenly, in micro-batches of unequal number; training goes
    on unharmed.
    """
    options = {
        "model": {"projection_init": "least_squares"},
        "validation": {"corpus": str(folder / "validation"), "every": 1},
        "optim": {"steps": 2, "lr": 1e-3},
        "lora": {"rank": 4, "dropout": 0.0},
    }
    train(configure(folder, run={"dir": str(folder / "alone")}, **options), WORLD)
    printed = capfd.readouterr().out.splitlines()
    messages = [line for line in printed if "probe, 9 lines in 2 languages: fvu" in line]
    assert len(messages) == 3 and "step 0: " in messages[0]
    config = configure(folder, run={"dir": str(folder / "two")}, zero={"stage": 3}, **options)
    (folder / "two.toml").write_text(dumps(config))
    for output in launch(2, "mtllm_engine.train", folder / "two.toml"):
        check_quiet(output)
    assert losses(folder / "two") == pytest.approx(losses(folder / "alone"), rel=1e-5)
    alone, two = (read_probe(folder / name) for name in ("alone", "two"))
    assert sorted(alone) == [0, 1, 2] and set(alone[0]) == {"", "eng_Latn", "swh_Latn", "quy_Latn"}
    for step, languages in alone.items():
        for language, measured in languages.items():
            assert two[step][language] == pytest.approx(measured, rel=1e-4)
    assert [row["probe_lines"] for row in rows(folder / "two") if "probe_lines" in row] == [
        NUM_LINES
    ] * 3
    assert len(read_metrics(folder / "two")[1]) == 3
    check_report(folder / "two")


def check_quiet(output: str) -> None:
    """Nothing but what we say ourselves: no library's warnings, no bar drawn into a file."""
    assert "Warning" not in output and "site-packages" not in output and "\r" not in output
    names = {line.split()[0] for line in output.splitlines() if line}
    ours = {"run", "learns", "encoder", "decoder", "texts", "projection", "parameters", "device"}
    assert names <= ours | {"weights", "step", "corpora", "licences", "kernels", "done,"}


def check_report(run: Path) -> None:
    page, last = (run / "report.html").read_text(), read_probe(run)[2]
    assert base64.b64encode((run / "probe.png").read_bytes()).decode() in page
    assert "Cross-lingual probe, step 2" in page
    for language in ("swh_Latn", "quy_Latn", "eng_Latn"):
        cells = "".join(
            f"<td>{last[language][name]:.4f}</td>" for name in ("fvu", "cosine", "retrieval")
        )
        assert f"<tr><th>{language_label(language)}</th>{cells}</tr>" in page


def test_without_a_folder_there_is_no_probe(folder: Path):
    assert open_with(configure(folder, probe={"folder": ""})) is None


@pytest.mark.parametrize(
    ("probe", "change", "message"),
    [
        (
            {"languages": ["deu_Latn"]},
            None,
            "there is neither {folder}/dev/deu_Latn.dev nor dev.deu_Latn beside it",
        ),
        ({"languages": ["swa_Latn"]}, None, "unknown language 'swa_Latn'"),
        (
            {"languages": ["arb_Latn"]},
            None,
            "the encoder's tokenizer has no token for the language arb_Latn",
        ),
        ({"languages": ["eng_Latn"]}, None, "has no language but English in dev"),
        ({"split": "devtest"}, None, "there is neither {folder}/devtest/eng_Latn.devtest nor"),
        (
            {},
            ("swh_Latn.dev", b"one\ntwo\n"),
            "swh_Latn.dev has 2 lines, the English file 9: line i of one must",
        ),
        ({}, ("dev.quy_Latn", b"one\n \n"), "dev.quy_Latn, line 2 is blank"),
        ({}, ("eng_Latn.dev", b"\xff\n"), "eng_Latn.dev is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, probe: dict, change, message: str):
    write_lines(tmp_path / "flores")
    if change:
        (tmp_path / "flores" / "dev" / change[0]).write_bytes(change[1])
    with pytest.raises(ValueError) as raised:
        open_with(configure(folder, probe={"folder": str(tmp_path / "flores")} | probe))
    assert message.format(folder=tmp_path / "flores") in str(raised.value) and "\n" not in str(
        raised.value
    )


def test_a_probe_needs_a_live_teacher(folder: Path):
    with pytest.raises(ValueError, match="probe.folder needs a live teacher"):
        configure(folder, data={"teacher_states": "states"})
    with pytest.raises(ValueError, match="probe.folder is for distillation"):
        configure(
            folder,
            objective={"kind": "finetune"},
            task={"name": "nli", "train": "mnli:x"},
            data={"train": ()},
        )
