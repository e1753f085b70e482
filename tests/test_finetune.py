"""The English task and stage 2 against transformers and PEFT, padded, in fp32; stored targets; what
a run leaves.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from mtllm_engine.config import Config
from mtllm_engine.data.annotations import NO_ANNOTATIONS, partners
from mtllm_engine.data.batch import IDLE, Batch, Document, Totals, collate
from mtllm_engine.data.stream import agree, each_step
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.evaluation.systems import cost
from mtllm_engine.finetune import finetune
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.stack import Stack
from mtllm_engine.targets import write_targets
from mtllm_engine.tasks import load_task, pack_split
from mtllm_engine.train import open_stream, prepare, train
from tests.support.padded import (
    FEW,
    PAD,
    Padded,
    assert_close,
    build,
    largest_gradient,
    load_llm,
    randomise,
    trained,
)
from tests.support.stages import (
    ALONE,
    SOURCES,
    build_models,
    checkpoint,
    finetuning_config,
    losses,
    rows,
    stage1_config,
    stage2_config,
    write_questions,
    write_topics,
)
from tests.support.tiny import WORDS, build_corpus
from tests.support.zero_worker import run

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("sib200", "belebele")
OUTPUTS = {"sib200": 7, "belebele": 4}
READERS = ("llm", "stack")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints, stage 1's run, and both tasks' English files."""
    folder = build_models(tmp_path_factory.mktemp("task"))
    write_topics(folder, "eng_Latn", train=20, dev=11)
    write_questions(folder, train=20, dev=7)
    train(stage1_config(folder), ALONE)
    return folder


@pytest.fixture(scope="module")
def finetuned(folder: Path) -> Path:
    """The folder, once the LLM has learned both tasks, six steps each, looked at and saved after
    each.
    """
    for task in TASKS:
        finetune(finetuning_config(folder, task, **LOOKED_AT), ALONE)
    return folder


LOOKED_AT = {
    "validation": {"every": 1},
    "checkpoint": {"every": 1, "keep": 1},
    "optim": {"steps": 6, "lr": 0.05},
}


@pytest.fixture(
    scope="module", params=[(task, reader) for task in TASKS for reader in READERS], ids="-".join
)
def learner(request, folder: Path) -> tuple[Stack, Padded, str, str]:
    """Ours and theirs with the same weights, the task, and the side whose tokens are read."""
    task, reader = request.param
    config = finetuning_config(folder, task, reader, lora={"dropout": 0.0})
    stack = randomise(build(config))
    adapters = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=list(config.lora.target_modules),
    )
    llm = peft.get_peft_model(load_llm(config), adapters)
    width = llm.config.hidden_size
    head = nn.Linear(width, OUTPUTS[task] if task == "sib200" else 1, bias=False)
    padded = Padded(config, llm, nn.Linear(32, width), head)
    with torch.no_grad():
        for name, ours in trained(stack).items():
            padded.of(name).copy_(ours)
    return stack, padded, task, "teacher" if reader == "llm" else "student"


def spans_of(generator: np.random.Generator, length: int, count: int) -> np.ndarray:
    """Disjoint spans in order, none empty, not all tokens in one of them."""
    edges = np.sort(generator.choice(length + 1, 2 * count, replace=False))
    return edges.reshape(-1, 2).astype(np.int32)


@st.composite
def examples(draw, task: str = "") -> list[Document]:
    """Labelled documents of random tokens; where choices are asked for, with 1 to 4 of them
    each.
    """
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    documents = []
    for number in range(draw(st.integers(2, 6))):
        lengths = draw(st.tuples(st.integers(8, 40), st.integers(8, 40)))
        student_ids_S, teacher_ids_T = (
            generator.integers(PAD + 1, 300, size, dtype=np.int32) for size in lengths
        )
        choices, spans = draw(st.integers(1, 4)), {}
        if task == "belebele":
            spans = {
                f"{side}_spans_P2": spans_of(generator, size, choices)
                for side, size in zip(("student", "teacher"), lengths)
            }
        document = Document(
            key=str(number),
            seed=number,
            student_ids_S=student_ids_S,
            teacher_ids_T=teacher_ids_T,
            label=int(generator.integers(choices if spans else 7)),
            **spans,
        )
        documents.append(document)
    return documents


def collated(documents: Sequence[Document], idle: Document = IDLE) -> Batch:
    return collate(documents, step_seed=0, device=ALONE.device, idle=idle)


def totals_of(documents: Sequence[Document]) -> Totals:
    aligned = sum(
        int((item.aligned_S >= 0).sum()) for item in documents if item.aligned_S is not None
    )
    return Totals(len(documents), sum(len(item.student_spans_P2) for item in documents), aligned)


def loss_and_gradients(
    stack: Stack, micro_batches: Sequence[Sequence[Document]]
) -> tuple[torch.Tensor, dict]:
    """Of a step whose micro-batches are these; an empty one is the idle one."""
    totals = totals_of([document for documents in micro_batches for document in documents])
    shares = [stack(collated(documents), totals).loss for documents in micro_batches]
    parameters = trained(stack)
    gradients = torch.autograd.grad(sum(shares), parameters.values())
    return sum(shares).detach(), dict(zip(parameters, gradients, strict=True))


def assert_same_step(
    stack: Stack,
    padded: Padded,
    micro_batches: Sequence,
    loss: torch.Tensor,
    addends: Sequence[torch.Tensor] = (),
) -> None:
    """Args: addends: What the loss's gradient is a sum of gradients of, if they may cancel: each
    rounds by itself.
    """
    ours, our_gradients = loss_and_gradients(stack, micro_batches)
    assert_close(ours, loss.detach())
    parameters = [padded.of(name) for name in our_gradients]
    gradients = [
        torch.autograd.grad(each, parameters, retain_graph=True) for each in (loss, *addends)
    ]
    largest = [sum(each.abs().max() for each in own) for own in zip(*(gradients[1:] or gradients))]
    allowed = dict(zip(our_gradients, largest, strict=True))
    for (name, gradient), theirs in zip(our_gradients.items(), gradients[0], strict=True):
        assert_close(gradient, theirs, name, largest_gradient(name, allowed))


def scores_apart(loss: torch.Tensor, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each score times the loss's derivative by it: by the chain rule their gradients add up to the
    loss's.
    """
    slopes = torch.autograd.grad(loss, scores, retain_graph=True)
    return [
        slope * score
        for slopes_Y, scores_Y in zip(slopes, scores)
        for slope, score in zip(slopes_Y, scores_Y)
    ]


@FEW
@given(data=st.data())
def test_task_loss_and_gradients_over_any_micro_batches(learner, data):
    """However a step's documents are parted, with an idle micro-batch besides: the mean over all of
    them.

    Of choices a gradient is a difference between spans of one text, often much smaller than what it
    is a difference of.
    """
    stack, padded, task, side = learner
    documents = data.draw(examples(task))
    cut = data.draw(st.integers(1, len(documents) - 1))
    micro_batches = data.draw(st.permutations([documents[:cut], documents[cut:], []]))
    scores = padded.scores(documents, side, task)
    terms = [
        functional.cross_entropy(each, torch.tensor(item.label))
        for each, item in zip(scores, documents)
    ]
    loss = torch.stack(terms).mean()
    addends = scores_apart(loss, scores) if task == "belebele" else ()
    assert_same_step(stack, padded, micro_batches, loss, addends)


def test_what_learns_the_task(learner):
    """Head and adapters; the projection too, where the stack reads."""
    stack, _, _, side = learner
    names = trained(stack).keys()
    assert "objective.head.weight" in names
    assert ("projection.weight" in names) == (side == "student")
    assert {name for name in names if ".student." in name} == {
        n for n, _ in stack.named_parameters() if "lora_" in n
    }


@FEW
@given(data=st.data())
def test_scores_are_those_of_the_exact_spans(learner, data):
    """The head on each choice's own tokens; -inf where a document has no such choice. Accuracy
    counts the best.
    """
    stack, padded, task, side = learner
    documents = data.draw(examples(task))
    stack.eval()
    with torch.no_grad():
        share = stack(collated(documents), totals_of(documents))
        pooled = padded.pooled(documents, side)
        if task == "sib200":
            expected_NY = padded.head(torch.cat(pooled))
        else:
            scores = [padded.head(pooled_PD)[:, 0] for pooled_PD in pooled]
            expected_NY = torch.full((len(documents), 4), -torch.inf)
            for row_Y, scores_P in zip(expected_NY, scores):
                row_Y[: len(scores_P)] = scores_P
    stack.train()
    ours_NY = share.outputs.scores_NY
    assert torch.equal(ours_NY.isinf(), expected_NY.isinf())
    assert_close(ours_NY.nan_to_num(neginf=0.0), expected_NY.nan_to_num(neginf=0.0))
    correct = [
        int(scores_Y.argmax()) == document.label
        for scores_Y, document in zip(expected_NY, documents)
    ]
    assert stack.objective.measures(share.moments) == {"accuracy": np.mean(correct)}


def test_documents_without_a_label_count_in_no_accuracy(learner):
    stack, _, task, _ = learner
    documents = examples_of(task)
    unlabelled = [replace(documents[0], label=-1), *documents[1:]]
    stack.eval()
    with torch.no_grad():
        moments = [
            stack(collated(items), totals_of(items)).moments
            for items in (unlabelled, documents[1:])
        ]
        none = stack(
            collated([replace(item, label=-1) for item in documents]), totals_of(documents)
        ).moments
    stack.train()
    assert torch.equal(*moments) and stack.objective.measures(none) == {}


@pytest.mark.parametrize("split", ["train", "dev"])
def test_what_has_no_label_is_not_learned(folder: Path, tmp_path: Path, split: str):
    """It is refused or skipped, in training and validation; else it would count among what the loss
    is a mean over.
    """
    write_topics(tmp_path, "eng_Latn", train=8, dev=6)
    table = tmp_path / "topics" / "eng_Latn" / f"{split}.tsv"
    header, first, *others = table.read_text().splitlines()
    table.write_text("\n".join([header, re.sub("\t[^\t]*\t", "\t-1\t", first, count=1), *others]))
    source = f"sib200:{tmp_path}/topics"
    config = finetuning_config(folder, "sib200", run={"dir": str(tmp_path / "run")})
    config = replace(config, task=replace(config.task, train=source, validation=source))
    message = refusal(config, finetune)
    assert (
        "key 0: it has no label to learn; leave it out, or set data.on_error" in message
        and "\n" not in message
    )
    finetune(replace(config, data=replace(config.data, on_error="skip")), ALONE)
    *_, trained_row, validated = rows(tmp_path / "run")
    assert (trained_row["skipped"] > 0) == (split == "train")
    assert validated["validation_documents"] == 6 - (split == "dev")


def examples_of(task: str, count: int = 4) -> list[Document]:
    """Some documents, always the same ones."""
    generator = np.random.default_rng(5)
    documents = []
    for number in range(count):
        sizes = generator.integers(12, 40, 2)
        spans = {}
        if task == "belebele":
            sides = zip(("student", "teacher"), sizes)
            spans = {
                f"{side}_spans_P2": spans_of(generator, size, 2 + number % 3)
                for side, size in sides
            }
        student_ids_S, teacher_ids_T = (
            generator.integers(PAD + 1, 300, size, dtype=np.int32) for size in sizes
        )
        ids = {"student_ids_S": student_ids_S, "teacher_ids_T": teacher_ids_T}
        documents.append(Document(key=str(number), seed=number, label=number % 2, **ids, **spans))
    return documents


@pytest.mark.parametrize("reader", READERS)
def test_what_is_kept_for_backward_changes_no_gradient_of_the_task(folder: Path, reader: str):
    """Bitwise, with dropout; the LLM alone differs from the stack: what enters its layers has no
    gradient.
    """
    gradients = []
    for recompute in ("cheap", "mlp", "layer"):
        memory = {"recompute": recompute}
        stack = randomise(
            build(
                finetuning_config(folder, "belebele", reader, lora={"dropout": 0.5}, memory=memory)
            )
        )
        gradients.append(loss_and_gradients(stack, [examples_of("belebele")])[1])
    saved, *others = gradients
    for other in others:
        assert all(torch.equal(saved[name], other[name]) for name in saved)


@pytest.fixture(scope="module", params=[0.25, 1.0])
def aligning(request, folder: Path) -> tuple[Stack, float]:
    """A stack that also learns from tokens, and the weight of that."""
    config = stage1_config(folder, objective={"token_weight": request.param}, lora={"dropout": 0.0})
    return randomise(build(config)), request.param


@FEW
@given(data=st.data())
def test_token_term_is_the_mean_over_aligned_tokens(aligning: tuple[Stack, float], data):
    """(1 - w) of the pooled error and w of the error of student tokens that have a partner, each a
    global mean.
    """
    stack, token_weight = aligning
    documents = [with_partners(item, number) for number, item in enumerate(data.draw(examples()))]
    cut, totals = data.draw(st.integers(1, len(documents) - 1)), totals_of(documents)
    idle = replace(IDLE, aligned_S=np.array([-1], np.int32))
    batches = [collated(documents[:cut]), collated(documents[cut:]), collated([], idle)]
    ours = sum(stack(batch, totals).loss for batch in batches).detach()
    states = [normed_states(stack, document) for document in documents]
    pooled = [
        (student_SD.mean(0) - teacher_TD.mean(0)).square().mean()
        for student_SD, teacher_TD in states
    ]
    tokens = [
        (student_SD[index] - teacher_TD[partner]).square().mean()
        for document, (student_SD, teacher_TD) in zip(documents, states)
        for index, partner in enumerate(document.aligned_S)
        if partner >= 0
    ]
    token_loss = torch.stack(tokens).mean() if tokens else torch.zeros(())
    assert_close(ours, (1 - token_weight) * torch.stack(pooled).mean() + token_weight * token_loss)


def with_partners(document: Document, seed: int) -> Document:
    generator = np.random.default_rng(seed)
    aligned_S = generator.integers(
        -1, len(document.teacher_ids_T), len(document.student_ids_S), dtype=np.int32
    )
    return replace(
        document, aligned_S=np.where(generator.random(len(aligned_S)) < 0.5, -1, aligned_S)
    )


def normed_states(stack: Stack, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's (S, D) and teacher's (T, D) finally normed states of one document, run alone."""
    captured = []
    hook = stack.objective.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[2:]))
    with torch.no_grad():
        stack(collated([document]), totals_of([document]))
    hook.remove()
    weight_D, eps = stack.objective.norm, stack.objective.eps
    student_SD, teacher_TD = (
        functional.rms_norm(x, x.shape[1:], weight_D, eps) for x in captured[0]
    )
    return student_SD, teacher_TD


@pytest.mark.parametrize(
    "changed", [{"alpha": 99.0}, {"rank": 2}, {"target_modules": ["q_proj"]}], ids=str
)
def test_start_with_other_adapters_is_refused(finetuned: Path, changed: dict):
    config = stage2_config(finetuned, "sib200", lora=changed)
    with pytest.raises(ValueError, match=f"^lora.{next(iter(changed))} is .* in model.init_from="):
        build_stack(config)


@pytest.fixture(scope="module", params=TASKS)
def distilling(request, finetuned: Path) -> tuple[Config, Stack]:
    """A configuration of stage 2, and what it builds."""
    config = stage2_config(finetuned, request.param, lora={"dropout": 0.0})
    return config, build(config)


@pytest.fixture(scope="module")
def opened(distilling: tuple[Config, Stack]) -> tuple[Padded, Padded]:
    """Student and teacher as PEFT opens the folders of stage 1 and of the fine-tuned LLM."""
    config, _ = distilling
    start, teacher = (
        peft.PeftModel.from_pretrained(load_llm(config), folder, is_trainable=True)
        for folder in (*config.model.init_from, config.model.teacher)
    )
    return Padded(config, start, saved_projection(config)), Padded(config, teacher)


@FEW
@given(data=st.data())
def test_stage_2_is_distillation_from_teacher_into_start(
    distilling: tuple[Config, Stack], opened, data
):
    """Span by span, over any micro-batches."""
    (config, stack), (student, teacher) = distilling, opened
    documents = data.draw(examples(config.task.name))
    cut = data.draw(st.integers(1, len(documents) - 1))
    students_PD = torch.cat(student.pooled(documents, "student"))
    with torch.no_grad():
        teachers_PD = torch.cat(teacher.pooled(documents, "teacher"))
    loss = (students_PD - teachers_PD).square().mean()
    assert_same_step(stack, student, [documents[:cut], [], documents[cut:]], loss)


@pytest.mark.parametrize("task", TASKS)
def test_stage_2_reads_more_text_than_the_tasks(finetuned: Path, task: str, tmp_path: Path):
    """Whole documents beside the task's spans, the teacher live or stored: both are learned
    alike.
    """
    more = build_corpus(tmp_path / "more", 24)
    data = {"train": [str(more)], "mixture": [1.0, 3.0], "pack_documents": 2}
    config = stage2_config(
        finetuned, task, run={"dir": str(tmp_path / "live")}, data=data, lora={"dropout": 0.0}
    )
    prepared = prepare(config)
    assert prepared.data.train == (str(tmp_path / "live" / "corpus" / "train"), str(more))
    stream = open_stream(prepared, build_tokenizer(prepared, build(prepared)), ALONE)
    drawn = [
        document
        for _ in range(6)
        for part in agree(stream, ALONE, 512).micro_batches
        for document in part
    ]
    stream.close()
    spans = {len(document.teacher_spans_P2) for document in drawn if document.label >= 0}
    plain = [document for document in drawn if document.label < 0]
    assert (
        spans == {OUTPUTS[task] if task == "belebele" else 1}
        and 0.6 < len(plain) / len(drawn) < 0.9
    )
    assert all(len(document.teacher_spans_P2) == 1 for document in plain)
    train(config, ALONE)
    stored = replace(config, run=replace(config.run, dir=str(tmp_path / "stored")))
    stored = replace(stored, data=replace(stored.data, teacher_states="states"))
    write_targets(stored, ALONE)
    train(stored, ALONE)
    live, from_files = (rows(tmp_path / name) for name in ("live", "stored"))
    for before, after in zip(live, from_files, strict=True):
        for key in before.keys() & {"loss", "fvu", "validation_fvu", "validation_accuracy"}:
            assert after[key] == pytest.approx(before[key], rel=1e-6), key


def saved_projection(config: Config) -> nn.Linear:
    saved = load_file(f"{config.model.init_from[0]}/projection.safetensors")
    width, encoder_width = saved["weight"].shape
    linear = nn.Linear(encoder_width, width)
    linear.load_state_dict(saved)
    return linear


def test_stage_2_measures_with_the_copied_head(distilling: tuple[Config, Stack]):
    config, stack = distilling
    saved = load_file(f"{config.model.teacher}/head.safetensors")
    assert torch.equal(stack.objective.head.weight, saved["head.weight"])
    assert not stack.objective.head.weight.requires_grad
    assert trained(stack).keys() >= {"projection.weight", "projection.bias"}
    documents = examples_of(config.task.name)
    stack.eval()
    with torch.no_grad():
        share = stack(collated(documents), totals_of(documents))
    stack.train()
    expected = [
        scores_Y.argmax().item() == item.label
        for scores_Y, item in zip(share.outputs.scores_NY, documents)
    ]
    assert stack.objective.measures(share.moments)["accuracy"] == np.mean(expected)


@pytest.fixture(scope="module", params=TASKS)
def distilled(request, finetuned: Path) -> tuple[Path, str]:
    """The folder and the task, once stage 2 has run, with the live teacher."""
    train(stage2_config(finetuned, request.param), ALONE)
    return finetuned, request.param


def test_stage_2_trains_the_projection_and_copies_the_head(distilled: tuple[Path, str]):
    folder, task = distilled
    saved = checkpoint(folder, f"stage2-{task}", "latest")
    teacher, start = checkpoint(folder, f"finetune-{task}"), checkpoint(folder, "stage1", "latest")
    assert (saved / "head.safetensors").read_bytes() == (teacher / "head.safetensors").read_bytes()
    assert not any("head" in name for name in load_file(saved / "optimizer.safetensors"))
    for name in ("projection.safetensors", "adapter_model.safetensors"):
        before, after = load_file(start / name), load_file(saved / name)
        assert before.keys() == after.keys()
        assert not any(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def stored(distilled: tuple[Path, str]) -> tuple[Path, Config]:
    """The folder, and a run that has learned from stored targets."""
    folder, task = distilled
    config = stored_config(folder, task)
    write_targets(config, ALONE)
    train(config, ALONE)
    return folder, config


def stored_config(folder: Path, task: str) -> Config:
    return stage2_config(
        folder, task, run={"dir": str(folder / f"stored-{task}")}, data={"teacher_states": "states"}
    )


def test_stored_targets_teach_what_the_live_teacher_does(stored: tuple[Path, Config]):
    folder, config = stored
    live, from_files = rows(folder / f"stage2-{config.task.name}"), rows(Path(config.run.dir))
    assert len(live) == len(from_files) == 5  # validation, three steps, validation
    for before, after in zip(live, from_files):
        for key in before.keys() & {"loss", "fvu", "validation_fvu", "validation_accuracy"}:
            assert after[key] == pytest.approx(before[key], rel=1e-6), key


def test_targets_that_are_there_are_left_alone(stored: tuple[Path, Config]):
    _, config = stored
    files = sorted(Path(config.run.dir).glob("corpus/*/teacher_states-states/*"))
    assert len(files) == 4  # of training and validation: states and a manifest
    before = [path.stat().st_mtime_ns for path in files]
    write_targets(config, ALONE)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_what_stored_targets_took_counts_as_cost(stored: tuple[Path, Config]):
    """Two FLOPs for each of the decoder's weights and each token of both corpora, beside what the
    runs took.
    """
    _, config = stored
    llm = load_llm(config)
    weights = sum(
        each.weight.numel() for each in llm.layers.modules() if isinstance(each, nn.Linear)
    )
    prepared = prepare(config)
    corpora = [Path(path) for path in (*prepared.data.train, prepared.validation.corpus)]
    flops = [2 * weights * num_teacher_tokens(prepared, corpus) for corpus in corpora]
    manifests = [
        json.loads((corpus / "teacher_states-states" / "manifest.json").read_text())
        for corpus in corpora
    ]
    assert [each["flops"] for each in manifests] == flops and all(
        each["gpu_hours"] > 0 for each in manifests
    )
    steps = [row for row in rows(Path(config.run.dir)) if "loss" in row]
    taken = [(sum(row["step_s"] for row in steps) / 3600, sum(row["flops"] for row in steps))]
    taken += [(each["gpu_hours"], each["flops"]) for each in manifests]
    taken += [cost([each]) for each in (*config.model.init_from, config.model.teacher)]
    assert cost([Path(config.run.dir) / "checkpoints" / "latest"]) == pytest.approx(
        tuple(map(sum, zip(*taken)))
    )


def num_teacher_tokens(config: Config, corpus: Path) -> int:
    models = (config.model.encoder, config.model.decoder)
    tokenizer = PairTokenizer(*models, max_length=config.data.max_length)
    stream = open_stream(config, tokenizer, ALONE, corpus=str(corpus))
    steps = each_step(stream, ALONE, config.memory.max_tokens)
    return sum(global_batch.teacher_tokens for global_batch in steps)


def refusal(config: Config, command: Callable = train) -> str:
    with pytest.raises(ValueError) as error:
        command(config, ALONE)
    assert "\n" not in str(error.value)
    return str(error.value)


CHANGES = {
    "data.max_length": {"data": {"max_length": 60}},
    "data.truncation": {"data": {"truncation": "independent"}},
    "model.causal": {"model": {"causal": True}},
    "model.dtype": {"model": {"dtype": "bfloat16"}},
}


@pytest.fixture
def untrained(stored: tuple[Path, Config], tmp_path: Path) -> tuple[Path, Config]:
    """The stored states, and a run that has not begun to learn from them."""
    folder, config = stored
    ignore = shutil.ignore_patterns("checkpoints")
    shutil.copytree(config.run.dir, tmp_path / "run", symlinks=True, ignore=ignore)
    return folder, replace(config, run=replace(config.run, dir=str(tmp_path / "run")))


@pytest.mark.parametrize("key", [*CHANGES, "model.teacher"])
def test_targets_of_another_teacher_are_refused(untrained: tuple[Path, Config], key: str):
    """By what would read them, and by what would write them: nothing is replaced behind the user's
    back.
    """
    folder, config = untrained
    other = checkpoint(folder, f"finetune-{config.task.name}", "other")
    changes = CHANGES.get(key, {"model": {"teacher": str(other)}})
    if not other.exists():
        shutil.copytree(other.with_name("best"), other)
        change_one_weight(other / "adapter_model.safetensors")
        (other / "state.json").unlink()  # which would say so
    changed = replace(
        config,
        **{name: replace(getattr(config, name), **values) for name, values in changes.items()},
    )
    of_states = (f"teacher_states-states was made with another {key} (", "`mtllm targets`")
    # What stage 2 starts from had the other attention too, and is looked at first.
    of_origin = ("/checkpoints/", "was trained with another model.causal than True; set it")
    for command in (train, write_targets):
        message = refusal(changed, command)
        parts = of_origin if command is train and key == "model.causal" else of_states
        assert all(part in message for part in parts), message


def change_one_weight(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})


def test_targets_of_another_text_are_refused(untrained: tuple[Path, Config], tmp_path: Path):
    folder, config = untrained
    task = load_task(config.task.name)
    corpus = Path(config.run.dir) / "corpus" / "train"
    for path in corpus.glob("*.*"):
        path.unlink()
    (corpus / "teacher_states-states").rename(tmp_path / "kept")
    pack_split(task, SOURCES[task.name].format(folder), "validation", "eng_Latn", corpus)
    (corpus / "source.txt").unlink()  # as if its files had other text now
    (tmp_path / "kept").rename(corpus / "teacher_states-states")
    assert f"{corpus}/teacher_states-states was made with another corpus (" in refusal(config)


def test_targets_that_nobody_made_are_asked_for(untrained: tuple[Path, Config]):
    _, config = untrained
    message = refusal(replace(config, data=replace(config.data, teacher_states="none")))
    assert "has no data.teacher_states='none'; make them with `mtllm targets`" in message


@pytest.mark.parametrize("task", TASKS)
def test_best_is_the_checkpoint_that_validated_best(finetuned: Path, task: str):
    """Six were saved, each after a look at the validation set; `checkpoint.keep` = 1 keeps the
    last, and this one.
    """
    accuracies = {
        row["step"]: row["validation_accuracy"]
        for row in rows(finetuned / f"finetune-{task}")
        if "validation_accuracy" in row
    }
    expected = max(range(1, 7), key=lambda step: (accuracies[step], step))
    folder = finetuned / f"finetune-{task}" / "checkpoints"
    assert (folder / "best").resolve().name == f"step-{expected:08d}"
    assert json.loads((folder / "best" / "state.json").read_text())["score"] == accuracies[expected]
    assert {path.name for path in folder.iterdir()} - {"other"} == {
        "latest",
        "best",
        "step-00000006",
        f"step-{expected:08d}",
    }


def test_stopped_task_run_goes_on_bitwise(finetuned: Path):
    options = LOOKED_AT | {"run": {"dir": str(finetuned / "stopped-task")}}
    config = finetuning_config(finetuned, "belebele", **options)
    assert_continues_bitwise(config, finetuned / "finetune-belebele")


def test_stopped_stage_2_goes_on_bitwise(stored: tuple[Path, Config]):
    folder, config = stored
    config = replace(
        config, run=replace(config.run, dir=str(folder / f"stopped-{config.task.name}"))
    )
    write_targets(config, ALONE)
    assert_continues_bitwise(config, folder / f"stored-{config.task.name}")


def assert_continues_bitwise(config: Config, whole: Path) -> None:
    stopped = Path(config.run.dir)
    run(config, ALONE, stop_at=2)
    assert len(losses(stopped)) == 2
    run(config, ALONE)
    assert losses(stopped) == losses(whole)
    states = [
        json.loads((path / "checkpoints" / "latest" / "state.json").read_text())
        for path in (stopped, whole)
    ]
    assert states[0]["files"] == states[1]["files"] and states[0]["lanes"] == states[1]["lanes"]
    assert (stopped / "checkpoints" / "best").resolve().name == (
        whole / "checkpoints" / "best"
    ).resolve().name


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PairTokenizer:
    return PairTokenizer(folder / "encoder", folder / "decoder", max_length=24)


LETTERS = st.text(st.sampled_from("aeinst ABß\u0301é漢字🙂\u00a0\u3000\t\n.,12"), max_size=6)
PIECES = st.one_of(st.sampled_from(WORDS), LETTERS, st.text(max_size=4))


@given(pieces=st.lists(PIECES, min_size=1, max_size=12), glue=st.sampled_from(["", " ", "  "]))
@example(pieces=["the", "the", "cat"], glue=" ")
@example(pieces=["漢", "🙂🙂", "é"], glue=" ")
def test_partners_are_the_tokens_that_are_one_on_both_sides(
    tokenizer: PairTokenizer, pieces: list[str], glue: str
):
    """By brute force: the only token of its characters on either side, white space at its ends
    aside.
    """
    text = glue.join(pieces)
    if not text.strip():
        return
    student, teacher = tokenizer.example(text, "eng_Latn", NO_ANNOTATIONS)
    cores = [
        [core(text, *offsets) for offsets in reading.offsets_S2.tolist()]
        for reading in (student, teacher)
    ]
    expected = [
        cores[1].index(each) if each and cores[0].count(each) == cores[1].count(each) == 1 else -1
        for each in cores[0]
    ]
    assert partners(text, student.offsets_S2, teacher.offsets_S2).tolist() == expected


def core(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A token's characters without white space around them; None where nothing is left, as of
    special tokens.
    """
    piece = text[start:end]
    if not piece.strip():
        return None
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def test_most_words_have_a_partner(tokenizer: PairTokenizer):
    """Or the test above would see nothing."""
    text = " ".join(sorted(set(WORDS), key=WORDS.count)[-12:])
    student, teacher = tokenizer.example(text, "eng_Latn", NO_ANNOTATIONS)
    assert (partners(text, student.offsets_S2, teacher.offsets_S2) >= 0).mean() > 0.5


def test_stream_tells_which_tokens_are_partners(folder: Path, tokenizer: PairTokenizer):
    config = stage1_config(folder, objective={"token_weight": 0.5}, data={"max_length": 24})
    stream = open_stream(config, tokenizer, ALONE)
    documents = [document for pack in stream.next_step() for document in pack.documents]
    stream.close()
    for document in documents:
        aligned_S, num_teacher = document.aligned_S, len(document.teacher_ids_T)
        assert (aligned_S >= 0).any() and (aligned_S < num_teacher).all()
        assert aligned_S[0] == aligned_S[-1] == -1  # the language token and `</s>`
