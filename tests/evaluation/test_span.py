"""Span heads: loss as padded PyTorch has it, answers by brute force; XQuAD learned and scored."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mtllm_engine.config import Config
from mtllm_engine.data.annotations import Annotations
from mtllm_engine.data.batch import Document, Totals, collate
from mtllm_engine.data.stream import build_stream
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation.bootstrap import summarise
from mtllm_engine.evaluation.predictions import load
from mtllm_engine.finetune import finetune
from mtllm_engine.model.build import build_tokenizer
from mtllm_engine.model.objective import LONGEST_ANSWER, SpanFinetuning, SpanHead, best_answers
from mtllm_engine.spans import build_spans
from mtllm_engine.tasks import Example, pack
from mtllm_engine.train import find_task
from mtllm_engine.training.report import read_metrics
from tests.support.padded import build
from tests.support.stages import BATCHES, passages, recorded_scores, write_passages
from tests.support.tiny import WORDS, build_config, build_decoder, build_encoder, build_world

WORLD = build_world()
WIDTH = 6
ROLES = {"teacher": "llm", "init_from": "stack"}
"""Key of `model` -> the run whose checkpoint it names."""
SIZES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 45), st.integers(0, 3)), min_size=1, max_size=4
)


def document(
    generator: np.random.Generator, sizes: tuple[int, int, int], *, answered: bool
) -> Document:
    """Tokens before, in and after the span; the answer somewhere in it."""
    before, inside, after = sizes
    start = before + int(generator.integers(inside))
    end = int(generator.integers(start, before + inside)) + 1
    answers = [[start, end], [before, before + 1]][: 2 * answered]
    sides = {}
    for side, letter in (("student", "S"), ("teacher", "T")):
        sides[f"{side}_ids_{letter}"] = np.zeros(sum(sizes), np.int32)
        sides[f"{side}_spans_P2"] = np.array([[before, before + inside]], np.int32)
        sides[f"{side}_answers_A2"] = np.array(answers, np.int32).reshape(-1, 2)
    return Document(key="a", seed=0, **sides)


@given(SIZES, st.integers(0, 99), st.sampled_from(["student", "teacher"]))
def test_loss_is_padded_pytorchs(sizes: list[tuple[int, int, int]], seed: int, side: str):
    """Its gradients too; documents without an answer add nothing, but count."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    documents = [document(generator, each, answered=bool(generator.integers(4))) for each in sizes]
    batch = collate(documents, step_seed=0, device=WORLD.device)
    objective = SpanFinetuning(nn.Parameter(torch.empty(WIDTH)), 1e-5, SpanHead(WIDTH), side=side)
    torch.nn.init.normal_(objective.head.weight), torch.nn.init.normal_(objective.norm)
    hidden_SD = torch.randn(sum(map(sum, sizes)), WIDTH, requires_grad=True)
    inputs = (hidden_SD, objective.head.weight)
    share = objective(batch, Totals(len(documents) + 1, len(documents) + 1), hidden_SD)

    padded_BLD = torch.nn.utils.rnn.pad_sequence(
        hidden_SD.split([sum(each) for each in sizes]), batch_first=True
    )
    normed_BLD = functional.rms_norm(padded_BLD, (WIDTH,), objective.norm, 1e-5)
    is_outside_BL = torch.ones(padded_BLD.shape[:2], dtype=torch.bool)
    targets_B2 = torch.full((len(documents), 2), -100)
    for index, each in enumerate(documents):
        is_outside_BL[index, slice(*each.student_spans_P2[0])] = False
        if len(each.student_answers_A2):
            targets_B2[index] = torch.tensor(each.student_answers_A2[0] - [0, 1])
    scores_2BL = (normed_BLD @ objective.head.weight.T).movedim(-1, 0)
    pairs = zip(scores_2BL.masked_fill(is_outside_BL, -1e9), targets_B2.T)
    sums = [functional.cross_entropy(*each, reduction="sum") for each in pairs]
    expected = sum(sums) / 2 / (len(documents) + 1)
    torch.testing.assert_close(share.loss, expected, rtol=1e-5, atol=1e-6)
    if expected > 0:
        gradients = [torch.autograd.grad(loss, inputs) for loss in (share.loss, expected)]
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    hits = sum(
        bool(len(each.student_answers_A2)) and (each.student_answers_A2[0] == answer).all()
        for each, answer in zip(documents, answers_of(objective, batch, hidden_SD))
    )
    assert share.moments.tolist() == [len(documents), hits]


def answers_of(objective: SpanFinetuning, batch, hidden_SD: torch.Tensor) -> np.ndarray:
    return objective.eval()(batch, Totals(1, 1), hidden_SD).outputs.answers_N2.numpy()


def test_an_idle_micro_batch_adds_nothing():
    norm = nn.Parameter(torch.empty(WIDTH))
    objective = SpanFinetuning(norm, 1e-5, SpanHead(WIDTH), side="student")
    for parameter in objective.parameters():
        torch.nn.init.ones_(parameter)
    idle = collate([], step_seed=0, device=WORLD.device)
    share = objective(idle, Totals(3, 3), torch.ones(1, WIDTH))
    assert share.loss == 0 and share.moments.tolist() == [0, 0]


@given(SIZES, st.integers(0, 99))
def test_the_best_answer_by_brute_force(sizes: list[tuple[int, int, int]], seed: int):
    torch.manual_seed(seed)
    scores_2S = torch.randn(2, sum(map(sum, sizes)))
    bounds, length = [], 0
    for before, inside, after in sizes:
        bounds.append((length + before, length + before + inside))
        length += before + inside + after

    def score(pair: tuple[int, int]) -> float:
        return float(scores_2S[0, pair[0]] + scores_2S[1, pair[1]])

    answers = best_answers(scores_2S, build_spans(bounds, length, "cpu")).tolist()
    for (first, last), answer in zip(bounds, answers, strict=True):
        ends = {start: min(last, start + LONGEST_ANSWER) for start in range(first, last)}
        pairs = [(start, end) for start in ends for end in range(start, ends[start])]
        assert tuple(answer) == max(pairs, key=score)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("span")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    # To answer what was learned is enough here.
    for name in ("train-v1.1", "dev-v1.1", "xquad.en", "xquad.hi"):
        write_passages(folder / "squad" / f"{name}.json", 12, seed=0)
    return folder


def configure(folder: Path, reader: str, **sections) -> Config:
    squad = f"squad:{folder / 'squad'}"
    options = {
        "run": {"dir": str(folder / reader)},
        "objective": {"kind": "finetune", "reader": reader},
        "task": {"name": "xquad", "train": squad, "validation": squad},
        "data": {"train": (), "lanes": 4, "pack_documents": 3},
        "optim": {"steps": 80, "lr": 1e-2},
        "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
        "memory": {"max_tokens": 512},
        "checkpoint": {"every": 100},
        "zero": {"stage": 0},
    }
    return build_config(folder, **options | sections)


@pytest.fixture(scope="module")
def learned(folder: Path) -> Path:
    for reader in ("llm", "stack"):
        finetune(configure(folder, reader), WORLD)
    return folder


@pytest.mark.parametrize("reader", ["llm", "stack"])
def test_stack_and_llm_learn_where_answers_are(learned: Path, reader: str):
    training, validation = read_metrics(learned / reader)
    assert training[-1]["loss"] < 0.05 * training[0]["loss"]
    assert validation[0]["validation_accuracy"] < 0.3 and validation[-1]["validation_accuracy"] == 1
    assert (learned / reader / "checkpoints" / "latest" / "head.safetensors").is_file()


def latest(folder: Path, run: str) -> str:
    return str(folder / run / "checkpoints" / "latest")


def bare_model(folder: Path) -> dict[str, str]:
    return {side: str(folder / side) for side in ("encoder", "decoder")} | {"dtype": "float32"}


def configure_evaluation(folder: Path, name: str, **sections) -> Config:
    """Of both readers in both languages, into a folder of this name."""
    checkpoints = {key: latest(folder, run) for key, run in ROLES.items()}
    model = bare_model(folder)
    options = {
        "run": {"dir": str(folder / name)},
        "model": model | checkpoints,
        "objective": {},
        "task": {"name": "xquad", "test": [f"xquad:{folder / 'squad'}"]},
        "evaluate": {"systems": ["llm", "stack"]},
    }
    return configure(folder, "stack", **options | sections)


def test_evaluation_answers_with_text_and_scores_it(learned: Path, capsys):
    evaluate(configure_evaluation(learned, "evaluation"), WORLD)
    predictions = load(learned / "evaluation" / "results")
    pairs = set(itertools.product(("llm", "stack"), ("eng_Latn", "hin_Deva")))
    assert {(each.system, each.language) for each in predictions} == pairs
    paragraphs = passages(12, seed=0)["data"][0]["paragraphs"]
    questions = [each["qas"][0] for each in paragraphs]
    expected = {each["id"]: [answer["text"] for answer in each["answers"]] for each in questions}
    for each in predictions:
        assert dict(zip(each.keys, each.labels)) == expected and each.metric == "exact_match_f1"
        if each.language == "eng_Latn" or each.system == "llm":
            assert list(each.predictions) == [expected[key][0] for key in each.keys]
        contexts = {paragraph["qas"][0]["id"]: paragraph["context"] for paragraph in paragraphs}
        assert all(answer in contexts[key] for key, answer in zip(each.keys, each.predictions))
    (table, *_) = summarise(predictions)
    assert table.measure == "exact_match" and table.scores["stack"]["eng_Latn"].value == 1
    assert "exact_match" in capsys.readouterr().out


def test_answers_do_not_depend_on_the_batches(learned: Path):
    runs = []
    for name in ("more lanes than documents", "packs by tokens", "all at once", "one by one"):
        with recorded_scores() as scores:
            evaluate(configure_evaluation(learned, name, **BATCHES[name]), WORLD)
        runs.append(scores)
    first, *others = runs
    pairs = itertools.product(ROLES.values(), ("eng_Latn", "hin_Deva"))
    assert first.keys() == {f"{side}/xquad/{code}" for side, code in pairs}
    for other, (corpus, scores) in itertools.product(others, first.items()):
        assert all(other[corpus][name] == scores[name] for name in ("keys", "scores"))
        assert scores["keys"] == [f"q{number}" for number in range(12)]
        states_ND = torch.tensor(other[corpus]["states"])
        expected_ND = torch.tensor(scores["states"])
        assert (states_ND - expected_ND).abs().max() <= 1e-5 * expected_ND.abs().max()


def test_the_first_answer_that_was_not_cut_away_is_the_target(folder: Path, tmp_path: Path):
    """The passage is too long for the answer at its end, and another one remains or none does."""
    passage = " ".join(WORDS[:100])
    text = f"word\n{passage}"
    late, early = (len(text) - 3, len(text)), (5, 5 + len(WORDS[0]))
    options = {"text": text, "spans": ((5, len(text)),), "cut": (5, len(text))}
    examples = [
        Example(key="both", answers=(late, early), **options),
        Example(key="late", answers=(late,), **options),
    ]
    pack(examples, tmp_path / "corpus", language="eng_Latn", licence="")
    config = configure(folder, "stack", data={"train": (), "lanes": 1, "pack_documents": 2})
    tokenizer = build_tokenizer(config, build(config))
    stream = build_stream(config.data, tokenizer, WORLD, seed=0, corpus=tmp_path / "corpus")
    (packed,) = stream.next_step()
    stream.close()
    both, none = sorted(packed.documents, key=lambda each: each.key)
    assert len(both.student_ids_S) <= 64
    assert len(both.student_answers_A2) == 1 and not len(none.student_answers_A2)
    for ids, offsets, (answer,) in (
        (both.student_ids_S, both.student_offsets_S2, both.student_answers_A2),
        (both.teacher_ids_T, both.teacher_offsets_T2, both.teacher_answers_A2),
    ):
        assert len(offsets) == len(ids)
        start, end = offsets[slice(*answer)].ravel()[[0, -1]]
        assert text[start:end].strip() == WORDS[0]
    batch = collate([none, both], step_seed=0, device=WORLD.device)
    first, last = both.student_answers_A2[0] + len(none.student_ids_S)
    assert batch.student_answers_N2.tolist() == [[-1, -1], [first, last - 1]]
    plain = tokenizer.example(text, "eng_Latn", Annotations())
    assert plain[0].answers_A2.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": {"kind": "distil", "reader": "stack"}},
            "no pooled state holds: learn it directly, by `mtllm finetune` with object",
        ),
        (
            {"evaluate": {"systems": ["llm", "translate_test"]}},
            "a translation has other pieces; leave it out",
        ),
    ],
)
def test_a_mistake_is_one_line(learned: Path, change: dict, message: str):
    model = bare_model(learned) | {"teacher": latest(learned, "llm")}
    task = {"name": "xquad", "test": [f"xquad:{learned / 'squad'}"]}
    config = configure(learned, "stack", model=model, **{"objective": {}, "task": task} | change)
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(config, WORLD) if "evaluate" in change else find_task(config)
    assert "\n" not in str(raised.value)


def test_a_test_set_without_answers_is_one_line(learned: Path):
    content = passages(2, seed=1)
    content["data"][0]["paragraphs"][1]["qas"][0]["answers"] = []
    (learned / "unanswered").mkdir()
    (learned / "unanswered" / "xquad.en.json").write_text(json.dumps(content))
    options = {"model": bare_model(learned) | {"teacher": latest(learned, "llm")}}
    options |= {"task": {"name": "xquad", "test": [f"xquad:{learned / 'unanswered'}"]}}
    options |= {"evaluate": {"systems": ["llm"]}, "run": {"dir": str(learned / "none")}}
    with pytest.raises(ValueError, match="example q1 has no accepted answer"):
        evaluate(configure(learned, "stack", objective={}, **options), WORLD)
