"""Answers: what `mtllm evaluate` says of the same examples; tasks added to a stack are its sums."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from mtllm_engine import MTLLM
from mtllm_engine.config import Config
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation.predictions import load
from mtllm_engine.evaluation.systems import Reader
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.tasks import Example, belebele, load_task, pack, xquad
from mtllm_engine.tasks.nli import LABELS as INFERENCES
from mtllm_engine.tasks.sib200 import LABELS, SIB200
from mtllm_engine.training.origins import add_up
from mtllm_engine.training.trained import Head
from tests.support.adapters import write_head, write_run
from tests.support.padded import TOLERANCE, Padded, attention_mask, load_llm, mean_pool, pad
from tests.support.recipes import error_of
from tests.support.scripts import SENTENCES
from tests.support.stages import (
    ALONE,
    build_models,
    checkpoint,
    evaluation_config,
    passages,
    recorded_scores,
    run_stages,
    write_belebele,
    write_topics,
)
from tests.support.tiny import build_config, build_decoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")
LANGUAGES = {"eng_Latn": 5, "swh_Latn": 9, "min_Arab": 4}
"""Examples of each; the last is given to the encoder as Indonesian."""
TASKS = {"nli": 3, "pawsx": 2, "belebele": 1, "xquad": 2, "sib200": 7}
"""Outputs of the heads."""
WIDTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stage 1, topics learned in English, stage 2, and all of them evaluated; a run of random
    adapters for each task, fine-tuned and after stage 2.
    """
    folder = build_models(tmp_path_factory.mktemp("answers"))
    write_topics(folder, "eng_Latn", train=16, dev=6)
    for number, (language, count) in enumerate(LANGUAGES.items()):
        write_topics(folder, language, seed=10 + number, test=count)
    run_stages(folder, "sib200")
    for seed, (task, outputs) in enumerate(TASKS.items()):
        lora = {"rank": 2 + seed, "alpha": 3.0, "target_modules": ["v_proj", "gate_proj"]}
        write_run(configure(folder, task, "llm", lora=lora), outputs=outputs, seed=20 + seed)
        write_run(configure(folder, task, "stack"), outputs=outputs, seed=30 + seed)
    return folder


def configure(folder: Path, task: str, reader: str, **sections) -> Config:
    """Of a run `READER TASK` that was fine-tuned."""
    options: dict[str, Any] = {"run": {"dir": str(folder / f"{reader} {task}")}}
    options["objective"] = {"kind": "finetune", "reader": reader}
    options["task"] = {"name": task, "train": f"{task}:{folder}"}
    if task == "belebele":
        options["task"]["train"] = f"belebele_training:{folder}"
    if task in ("nli", "xquad"):
        options["task"]["train"] = {"nli": "mnli", "xquad": "squad"}[task] + f":{folder}"
    options["data"] = {"train": []}
    return build_config(folder, **options, zero={"stage": 0}, **sections)


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> dict[tuple[str, str], tuple[Sequence[int], np.ndarray]]:
    """The classes that `mtllm evaluate` predicts and the scores that it finds, by system and
    language.
    """
    stage1 = str(checkpoint(folder, "stage1", "latest"))
    options = {"evaluate": {"systems": ["stack", "sum"], "stage1": [stage1]}}
    predicted = {}
    for system in ("stack", "sum"):
        options["evaluate"]["systems"] = [system]
        config = evaluation_config(folder, "sib200", f"sib200:{folder}/topics", **options)
        config = replace(config, run=replace(config.run, dir=str(folder / f"evaluate {system}")))
        with recorded_scores() as scores:
            evaluate(config, ALONE)
        for each in load(folder / f"evaluate {system}" / "results"):
            scores_NY = np.array(scores[f"stack/sib200/{each.language}"]["scores"])
            predicted[system, each.language] = (each.predictions.tolist(), scores_NY)
    return predicted


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Path:
    """Its checkpoint."""
    return checkpoint(folder, "stage1", "latest").resolve()


@pytest.fixture(scope="module")
def base(folder: Path) -> MTLLM:
    """Of stage 1, with a task of every kind added."""
    model = MTLLM.from_pretrained(folder / "stage1")
    model.add_task("topics", folder / "finetune-sib200")
    for task in TASKS:
        model.add_task(task, folder / f"llm {task}")
    return model


def softmax(scores_NY: np.ndarray) -> np.ndarray:
    powers_NY = np.exp(scores_NY.astype(float) - scores_NY.max(-1, keepdims=True))
    return powers_NY / powers_NY.sum(-1, keepdims=True)


def with_fallback(model: MTLLM) -> MTLLM:
    """The languages that evaluation was given fallbacks for."""
    config = model.trained.config
    languages = replace(config.languages, fallback={"min_Arab": "ind_Latn"})
    model.trained = replace(model.trained, config=replace(config, languages=languages))
    return model


@pytest.mark.parametrize("system", ["stack", "sum"])
def test_classes_are_those_that_evaluation_predicts(
    folder: Path, stage1: Path, evaluated, tmp_path: Path, system: str
):
    """Of the stack after stage 2 and of the sum, in any batch."""
    trained = folder / "stage2-sib200"
    if system == "sum":
        trained = tmp_path / "sum"
        add_up([str(stage1), str(checkpoint(folder, "finetune-sib200"))], trained)
    model = with_fallback(MTLLM.from_pretrained(trained))
    assert model.tasks == {"sib200": Head(kind="classification", num_outputs=7, labels=LABELS)}
    for language in LANGUAGES:
        examples = list(SIB200.read(folder / "topics", "test", language))
        classes, scores_NY = evaluated[system, language]
        for max_tokens in (1, 8192):
            options = {"max_tokens": max_tokens}
            found = model.classify([each.text for each in examples], language, **options)
            assert found.labels == [LABELS[index] for index in classes]
            assert found.names == LABELS
            assert_close(found.probabilities, softmax(scores_NY))


def test_a_stage_2_stack_meets_its_teacher_in_one_space(folder: Path):
    """Real runs': the teacher is the fine-tuned LLM that the run names, by `best`."""
    model = MTLLM.from_pretrained(folder / "stage2-sib200")
    llm = load_llm(model.trained.config)
    tuned = peft.PeftModel.from_pretrained(llm, checkpoint(folder, "finetune-sib200"))
    tokenizer, plain = model._sides["teacher"].tokenizer.decoder, texts(5, longest=6)
    ids_BL, real_BL = pad([np.array(tokenizer(text)["input_ids"]) for text in plain])
    with torch.no_grad():
        mask = attention_mask(real_BL, causal=False)
        states_BLD = tuned(input_ids=ids_BL, attention_mask=mask).last_hidden_state
    assert_close(model.encode(plain, reader="teacher"), mean_pool(states_BLD, real_BL).numpy())


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """To 1e-5 of the largest."""
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def evaluation_of(
    folder: Path, task: str, examples: Sequence[Example], out: Path
) -> tuple[np.ndarray, np.ndarray]:
    """What `mtllm evaluate`'s reader says of examples in Swahili: the stack's answers, and those of
    the sum of stage 1 and the LLM.
    """
    pack(examples, out, language="swh_Latn", licence="none")
    config = configure(folder, task, "stack")
    model = replace(config.model, dtype="float32")
    config = replace(config, model=model, data=replace(config.data, train=()))
    runs = [[f"stack {task}"], ["stage1", f"llm {task}"]]
    answers = []
    for checkpoints in ([str(checkpoint(folder, run, "latest")) for run in each] for each in runs):
        reader = Reader(config, ALONE, load_task(task), "stack", checkpoints)
        keys, _, rows = reader(out)
        assert keys == [each.key for each in examples]
        answers.append(rows)
    return answers[0], answers[1]


@pytest.mark.parametrize("task", ["nli", "pawsx"])
def test_pairs_are_read_as_evaluation_reads_them(
    folder: Path, base: MTLLM, tmp_path: Path, task: str
):
    """Too long ones are shortened in the first; one may be empty."""
    sentences = texts(20, seed=3) + ["", "the end " * 60]
    generator = random.Random(1)
    pairs = [(generator.choice(sentences), generator.choice(sentences)) for _ in range(12)]
    pairs += [("the end " * 60, "a b"), ("", "a"), ("a b", "the end " * 60)]
    examples = []
    for number, (first, second) in enumerate(pairs):
        text = f"{first}\n{second}"
        examples.append(Example(key=str(number), text=text, label=0, cut=(0, len(first))))
    for model, scores_NY in zip(
        (MTLLM.from_pretrained(folder / f"stack {task}"), base),
        evaluation_of(folder, task, examples, tmp_path / "corpus"),
    ):
        before = model.cut
        found = model.classify(pairs, "swh_Latn", task=task)
        names = load_task(task).labels
        assert found.labels == [names[index] for index in scores_NY.argmax(1)]
        assert np.ptp(found.probabilities[:, 0]) > 0.01
        assert_close(found.probabilities, softmax(scores_NY))
        assert model.cut > before


def test_a_choice_is_the_one_that_evaluation_makes(folder: Path, base: MTLLM, tmp_path: Path):
    write_belebele(tmp_path / "belebele" / "swh_Latn.jsonl", "swh_Latn")
    lines = (tmp_path / "belebele" / "swh_Latn.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    asked = [
        (row["flores_passage"], row["question"], [row[f"mc_answer{n}"] for n in range(1, 5)])
        for row in rows
    ]
    asked += [("the end " * 60, "Who?", ["he", "she", "", "they"])]
    examples = [belebele.compose(str(n), *each, 0) for n, each in enumerate(asked)]
    for model, scores_NY in zip(
        (MTLLM.from_pretrained(folder / "stack belebele"), base),
        evaluation_of(folder, "belebele", examples, tmp_path / "corpus"),
    ):
        for each, scores_Y in zip(asked, scores_NY):
            chosen = model.choose(*each, language="swh_Latn", task="belebele")
            assert chosen.index == scores_Y.argmax()
            assert_close(chosen.probabilities, softmax(scores_Y))
        few = model.choose("the end", "Who?", ["he", "she"], "swh_Latn", task="belebele")
        assert few.probabilities.shape == (2,) and abs(few.probabilities.sum() - 1) < 1e-6
        one = model.choose("the end", "Who?", ["he"], "swh_Latn", task="belebele")
        assert (one.index, one.probabilities.tolist()) == (0, [1.0])


def test_an_answer_is_the_one_that_evaluation_finds(folder: Path, base: MTLLM, tmp_path: Path):
    paragraphs = passages(9, seed=0, longest=40)["data"][0]["paragraphs"]
    asked = [(each["qas"][0]["question"], each["context"]) for each in paragraphs]
    asked += [("the", "the end " * 60)]
    examples = [
        replace(example, answers=example.spans)
        for example in (xquad.compose(str(number), *each) for number, each in enumerate(asked))
    ]
    for model, ranges_N2 in zip(
        (MTLLM.from_pretrained(folder / "stack xquad"), base),
        evaluation_of(folder, "xquad", examples, tmp_path / "corpus"),
    ):
        for each, example, (start, end) in zip(asked, examples, ranges_N2):
            answer = model.answer(*each, language="swh_Latn", task="xquad")
            assert answer == example.text[start:end].strip()
            assert answer and answer in each[1]


def test_an_added_task_is_the_sum_that_would_be_written(
    folder: Path, stage1: Path, base: MTLLM, tmp_path: Path
):
    """To the last bit, whatever other tasks are there."""
    for task, run in (("topics", "finetune-sib200"), ("pawsx", "llm pawsx")):
        parts = [str(stage1), str(checkpoint(folder, run, "latest"))]
        add_up(parts, tmp_path / task)
        written = MTLLM.from_pretrained(tmp_path / task)
        plain = texts(9)
        ours = base.classify(plain, "swh_Latn", task=task)
        theirs = written.classify(plain, "swh_Latn")
        assert ours.labels == theirs.labels and ours.names == theirs.names
        assert np.array_equal(ours.probabilities, theirs.probabilities)
    # The stack itself reads as before.
    alone = MTLLM.from_pretrained(stage1)
    assert np.array_equal(alone.encode(plain, "swh_Latn"), base.encode(plain, "swh_Latn"))
    teachers = [model.encode(plain, reader="teacher") for model in (alone, base)]
    assert np.array_equal(*teachers)


def numbers_in(model: MTLLM) -> int:
    heads = [task.module for task in model._tasks.values()]
    modules = [*model.stack.modules(), *heads]
    tensors = {each for module in modules for each in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() for tensor in tensors)


def test_many_tasks_are_on_one_base(folder: Path, stage1: Path):
    """What a task adds are adapters of both ranks on all that have any, and its head."""
    model = MTLLM.from_pretrained(stage1)
    sizes = [(each.in_width, sum(each.members.widths)) for each in linears(model)]
    before, frozen = numbers_in(model), [each.weight.data_ptr() for each in linears(model)]
    for task in ("nli", "pawsx"):
        model.add_task(task, folder / f"llm {task}")
        rank = 4 + 2 + list(TASKS).index(task)
        members = {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}
        added = sum(
            rank * (count * in_width + out_width)
            for (in_width, out_width), count in zip(sizes, [*members.values()] * 3)
        )
        assert numbers_in(model) == before + added + TASKS[task] * WIDTH
        before = numbers_in(model)
    assert frozen == [each.weight.data_ptr() for each in linears(model)]
    assert {name: head.kind for name, head in model.tasks.items()} == dict.fromkeys(
        ("nli", "pawsx"), "classification"
    )


def linears(model: MTLLM) -> list[LoraLinear]:
    return [each for each in model.stack.decoder.modules() if isinstance(each, LoraLinear)]


KEYS = [
    {"r": 1, "lora_alpha": 16, "target_modules": ["q_proj"]},
    {"r": 9, "lora_alpha": 3, "use_rslora": True, "target_modules": ["down_proj", "k_proj"]},
]


@torch.no_grad()
def write_peft(folder: Path, llm: nn.Module, outputs: int = 3, **keys: Any) -> nn.Module:
    """A folder of PEFT's own with a head beside it; returns PEFT's model."""
    tuned = peft.get_peft_model(llm, peft.LoraConfig(**keys))
    generator = torch.Generator().manual_seed(6)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3, generator=generator)
    tuned.save_pretrained(folder)
    write_head(folder, outputs, llm.config.hidden_size, seed=4)
    return tuned


@pytest.mark.parametrize("keys", KEYS, ids=["small", "stabilised"])
@pytest.mark.parametrize("around", [LlamaModel, LlamaForCausalLM])
def test_a_folder_of_pefts_is_added_as_peft_applies_it(
    folder: Path, stage1: Path, tmp_path: Path, around: type, keys: dict
):
    """Of any rank, factor and linears, whatever the LLM's class was when it was saved."""
    tuned = write_peft(tmp_path / "peft", around.from_pretrained(folder / "decoder"), **keys)
    model = MTLLM.from_pretrained(stage1)
    names = ("no", "maybe", "yes")
    model.add_task("mine", tmp_path / "peft", labels=names)
    plain = [*texts(6), *SENTENCES["ell_Grek"]]
    found = model.classify(plain, "swh_Latn")
    # The student's update and PEFT's are added to the weights, and the head reads what is pooled.
    config = model.trained.config
    llm = peft.PeftModel.from_pretrained(load_llm(config), stage1).merge_and_unload()
    for name, linear in tuned.get_base_model().named_modules():
        if isinstance(linear, peft.tuners.lora.Linear):
            weight = llm.get_submodule(name.removeprefix("model.")).weight.data
            weight += linear.get_delta_weight("default")
    saved = load_file(stage1 / "projection.safetensors")
    projection = nn.Linear(*saved["weight"].T.shape)
    projection.load_state_dict(saved)
    padded = Padded(config, llm, projection)
    ids = [model._sides["student"].tokenizer(text, "swh_Latn")[0] for text in plain]
    with torch.no_grad():
        ids_BL, real_BL = pad(ids)
        embedded_BLD = padded.projected(ids_BL, real_BL)
        mask = attention_mask(real_BL, causal=False)
        states_BLD = llm(inputs_embeds=embedded_BLD, attention_mask=mask).last_hidden_state
        head = load_file(tmp_path / "peft" / "head.safetensors")["head.weight"]
        scores_BY = (mean_pool(states_BLD, real_BL) @ head.T).numpy()
    assert_close(found.probabilities, softmax(scores_BY))
    assert found.labels == [names[index] for index in scores_BY.argmax(1)]


def test_classes_have_the_names_that_are_given_or_the_familys_or_numbers(
    folder: Path, stage1: Path, tmp_path: Path
):
    write_peft(tmp_path / "peft", load_llm(configure(folder, "nli", "llm")), **KEYS[0])
    model = MTLLM.from_pretrained(stage1)
    model.add_task("mine", tmp_path / "peft")
    model.add_task("given", tmp_path / "peft", labels=["a", "b", "c"])
    model.add_task("nli", tmp_path / "peft")
    model.add_task("of-a-run", folder / "llm nli")
    model.add_task("renamed", folder / "llm nli", labels=["x", "y", "z"])
    expected = [("0", "1", "2"), ("a", "b", "c"), INFERENCES, INFERENCES, ("x", "y", "z")]
    for (task, head), names in zip(model.tasks.items(), expected, strict=True):
        assert head == Head(kind="classification", num_outputs=3, labels=names)
        found = model.classify(["the end", "a"], "swh_Latn", task=task)
        assert found.names == names and {*found.labels} <= {*names}


def test_no_texts_have_no_classes(base: MTLLM):
    found = base.classify([], "swh_Latn", task="nli")
    assert found.labels == [] and found.probabilities.shape == (0, 3)
    assert found.probabilities.dtype == np.float32


def refused(folder: Path, tmp_path: Path) -> dict[str, tuple[Path, dict, str]]:
    """Adapters, options of `add_task`, and what is said."""
    config = configure(folder, "nli", "llm")
    mine = {"name": "mine"}
    cases = {}
    llm = partial(load_llm, config)
    for case in ("5 outputs", "no head", "no adapters", "bad head", "bad adapters", "wide head"):
        write_peft(tmp_path / case, llm(), 5 if case == "5 outputs" else 3, **KEYS[0])
    (tmp_path / "no head" / "head.safetensors").unlink()
    (tmp_path / "no adapters" / "adapter_model.safetensors").unlink()
    spoil(tmp_path / "bad head" / "head.safetensors", "head.weight")
    spoil(tmp_path / "bad adapters" / "adapter_model.safetensors", "lora_B.weight")
    cases["a family of fewer"] = (tmp_path / "5 outputs", {}, r"5 outputs, .*nli asks for 3")
    cases["too few labels"] = (
        tmp_path / "5 outputs",
        mine | {"labels": ["a"]},
        "has 5 classes.* 1 labels",
    )
    labels = {"labels": ["a", "b"]}
    cases["too few for a family"] = (folder / "llm nli", labels, "has 3 classes.* 2 labels")
    cases["no head"] = (tmp_path / "no head", mine, "has no head.safetensors")
    cases["no adapters"] = (tmp_path / "no adapters", mine, "has no adapter_model.safetensors")
    cases["NaN in the head"] = (tmp_path / "bad head", mine, "head.weight.*NaN or infinite")
    cases["NaN in adapters"] = (tmp_path / "bad adapters", mine, "lora_B.weight.*NaN or infinite")
    cases["nothing"] = (tmp_path / "gone", mine, "gone is neither a run, a checkpoint")
    # Of other LLMs: by what a run says, and by the shape of what says nothing.
    others = {"width": {"width": 64}, "depth": {"layers": 4}, "shallow": {"layers": 2}}
    for name, keys in others.items():
        build_decoder(tmp_path / name, **keys)
        write_peft(tmp_path / f"of {name}", LlamaModel.from_pretrained(tmp_path / name), **KEYS[0])
        write_head(tmp_path / f"of {name}", 3, WIDTH, seed=4)
        cases[f"of another {name}"] = (tmp_path / f"of {name}", mine, f"of {name}.*q_proj")
    write_head(tmp_path / "wide head", 3, 64, seed=0)
    cases["a wide head"] = (tmp_path / "wide head", mine, r"head.weight is \(3, 64\)")
    for key, value in (("decoder", str(tmp_path / "depth")), ("causal", True)):
        model, run = replace(config.model, **{key: value}), tmp_path / f"another {key}"
        other = replace(config, model=model, run=replace(config.run, dir=str(run)))
        write_run(other, outputs=3)
        cases[f"another {key}"] = (run, mine, f"was trained with another model.{key} than ")
    # A run's that is no more what was written.
    damaged = shutil.copytree(folder / "llm nli", tmp_path / "damaged", symlinks=True)
    path = damaged / "checkpoints" / "latest" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cases["damaged"] = (damaged, mine, "adapter_model.safetensors is damaged")
    cases["a stack"] = (folder / "stack nli", mine, "is a stack itself")
    sound = folder / "llm nli"
    cases["taken"] = (sound, {"name": "sib200"}, "name 'sib200' is taken")
    for name in ("", "a b", "../a", "a.b"):
        cases[f"the name {name!r}"] = (sound, {"name": name}, "must be letters, digits, - and _")
    return cases


def spoil(path: Path, part: str) -> None:
    """A number that is none."""
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def test_what_is_no_task_for_the_stack_is_refused_and_leaves_it_as_it_was(
    folder: Path, stage1: Path, tmp_path: Path
):
    model = MTLLM.from_pretrained(stage1)
    model.add_task("sib200", folder / "finetune-sib200")
    before, numbers = model.tasks, numbers_in(model)
    wrong = {}
    for case, (adapter, options, message) in refused(folder, tmp_path).items():
        try:
            said = error_of(partial(add, model, adapter, **options))
        except pytest.fail.Exception:
            said = "it was not refused"
        if not re.search(message, said) or numbers_in(model) != numbers or model.tasks != before:
            wrong[case] = said
    assert not wrong
    model.add_task("mine", folder / "llm nli")
    assert model.tasks.keys() == {"sib200", "mine"}


def add(model: MTLLM, adapter: Path, *, name: str = "nli", labels: Sequence[str] = ()) -> None:
    model.add_task(name, adapter, labels=labels)


def test_a_stack_that_knows_its_task_takes_no_other(folder: Path, stage1: Path, tmp_path: Path):
    add_up([str(stage1), str(checkpoint(folder, "llm nli", "latest"))], tmp_path / "sum")
    for run in (folder / "stage2-sib200", folder / "stack nli", tmp_path / "sum"):
        model = MTLLM.from_pretrained(run)
        message = error_of(lambda: model.add_task("mine", folder / "llm nli"))  # noqa: B023
        assert f"{run} was trained for a task itself" in message and len(model.tasks) == 1


def test_a_fine_tuned_llm_alone_is_no_stack(folder: Path):
    for name in ("finetune-sib200", "llm nli"):
        message = error_of(partial(MTLLM.from_pretrained, folder / name))
        assert f"{folder / name} is a fine-tuned LLM without a projection" in message
        assert "add_task" in message


ASKED: dict[str, Callable[[MTLLM, str], object]] = {
    "classification": lambda model, task: model.classify(["a"], "swh_Latn", task=task),
    "choice": lambda model, task: model.choose("a", "b", ["c"], "swh_Latn", task=task),
    "span": lambda model, task: model.answer("a", "b c", "swh_Latn", task=task),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_head_answers_its_own_question_and_the_error_says_which(
    folder: Path, stage1: Path, base: MTLLM, kind: str
):
    for task, head in base.tasks.items():
        if head.kind == kind:
            ASKED[kind](base, task)
        else:
            message = error_of(lambda: ASKED[kind](base, task))  # noqa: B023
            assert f"of the kind {kind}" in message and f"{task} ({head.kind})" in message
    assert "nli (classification), pawsx" in error_of(lambda: ASKED[kind](base, ""))
    assert "there is no task 'xnli'" in error_of(lambda: ASKED[kind](base, "xnli"))
    bare = MTLLM.from_pretrained(stage1)
    for task in ("", "nli"):
        message = error_of(lambda: ASKED[kind](bare, task))  # noqa: B023
        assert "is stage 1 only and answers no task; use encode, or fine-tune" in message
    own = MTLLM.from_pretrained(folder / "stack belebele")
    if kind != "choice":
        message = error_of(lambda: ASKED[kind](own, ""))
        assert f"{folder / 'stack belebele'} has belebele (choice)" in message


BAD: dict[str, tuple[Callable[[MTLLM], object], str]] = {
    "no choice": (lambda m: m.choose("a", "b", [], "swh_Latn", task="belebele"), "0 choices"),
    "five": (lambda m: m.choose("a", "b", [*"abcde"], "swh_Latn", task="belebele"), "1 to 4"),
    "no passage": (lambda m: m.answer("who?", "", "swh_Latn", task="xquad"), "passage|span|empty"),
    "blank": (lambda m: m.answer("who?", " \n", "swh_Latn", task="xquad"), "passage|span|empty"),
    "a surrogate": (lambda m: m.answer("who?", "\ud800", "swh_Latn", task="xquad"), "not Unicode"),
    "no language": (lambda m: m.choose("a", "b", ["c"], task="belebele"), "say which language"),
    "unknown": (lambda m: m.answer("a", "b", "swahili", task="xquad"), "did you mean swh_Latn"),
    "alone": (lambda m: m.classify("a", "swh_Latn", task="nli"), r"write a list: \[text\]"),
    "three": (lambda m: m.classify([("a", "b", "c")], "swh_Latn", task="nli"), r"texts\[0\]"),
    "half": (lambda m: m.classify([("a", None)], "swh_Latn", task="nli"), r"texts\[0\] is no text"),
    "of a pair": (
        lambda m: m.classify(["a", ("a", "\ud800")], "swh_Latn", task="nli"),
        r"texts\[1\] is not Unicode",
    ),
}


@pytest.mark.parametrize("ask, message", BAD.values(), ids=BAD)
def test_bad_questions_are_one_line(base: MTLLM, ask, message: str):
    assert re.search(message, error_of(lambda: ask(base)))
