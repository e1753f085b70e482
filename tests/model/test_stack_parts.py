"""Texts in parts against a padded PyTorch loop that encodes each by itself: fp32, 1e-5."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations, partners
from mtllm_engine.data.batch import Document, Totals, collate
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model.build import build_tokenizer
from tests.support.padded import (
    FEW,
    PAD,
    Padded,
    assert_close,
    build,
    largest_gradient,
    load_llm,
    randomise,
    their_name,
    trained,
)
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_config, build_decoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LONGEST = 160  # data.max_length
WEIGHT = 0.4  # of the token term


@pytest.fixture(scope="module")
def stacks(tmp_path_factory) -> SimpleNamespace:
    """A stack with tokenizers by kind of parts, and the same weights in transformers and PEFT."""
    folder = tmp_path_factory.mktemp("stack_parts")
    build_encoder(folder / "encoder", samples=[*itertools.chain(*SENTENCES.values())])
    build_decoder(folder / "decoder")
    options = {"objective": {"token_weight": WEIGHT}, "zero": {"stage": 0}}
    options["memory"] = {"max_tokens": 9 * LONGEST}
    options["lora"] = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    configs = {
        kind: build_config(folder, data={"parts": kind, "max_length": LONGEST}, **options)
        for kind in ("whole", "lines", "sentences")
    }
    stack = randomise(build(configs["lines"]))
    return SimpleNamespace(
        stack=stack,
        padded=copy_padded(configs["lines"], stack),
        tokenizers={kind: build_tokenizer(each, stack) for kind, each in configs.items()},
    )


def copy_padded(config, stack) -> Padded:
    lora = config.lora
    adapters = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules)
    )
    width, encoder_width = stack.projection.weight.shape
    llm = peft.get_peft_model(load_llm(config), adapters)
    padded = Padded(config, llm, nn.Linear(encoder_width, width))
    with torch.no_grad():
        for name, ours in trained(stack).items():
            padded.of(name).copy_(ours)
    return padded


def read(tokenizer: PairTokenizer, number: int, text: str, annotations: Annotations) -> Document:
    student, teacher = tokenizer.example(text, "eng_Latn", annotations)
    return Document(
        key=str(number),
        seed=number,
        student_ids_S=student.ids_S,
        teacher_ids_T=teacher.ids_S,
        student_spans_P2=student.spans_P2,
        teacher_spans_P2=teacher.spans_P2,
        aligned_S=partners(text, student.offsets_S2, teacher.offsets_S2),
        parts_Q2=student.parts_Q2,
    )


BIT = st.sampled_from([*itertools.chain(*SENTENCES.values()), "a", "B. ", "Yes. ", "the ", ""])
TEXT = st.lists(BIT | st.sampled_from(["\n", "\n\n", " "]), max_size=8).map("".join)
EXTREMES = ["", "a", "\n", "a\n\n", "the " * 300, "B.\n" * 200, "Yes. Why? No!\n\nthe end"]


@FEW
@given(texts=st.lists(TEXT, min_size=1, max_size=5), kind=st.sampled_from(["lines", "sentences"]))
@example(texts=EXTREMES, kind="lines")
@example(texts=EXTREMES, kind="sentences")
def test_texts_in_parts_are_a_loop_over_them(stacks, texts, kind):
    """Of one-token documents alone, q and k get no gradient: there is a longer one too."""
    texts = [*texts, "One two.\nThree. Four five six."]
    tokenizer = stacks.tokenizers[kind]
    documents = [read(tokenizer, *each, NO_ANNOTATIONS) for each in enumerate(texts)]
    assert_same(stacks, documents)


@FEW
@given(seed=st.integers(0, 99))
def test_choices_of_texts_in_parts_are_pooled_as_a_loop_pools_them(stacks, seed):
    """Each choice is a line, of several sentences at times; the last goes on over two lines."""
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(2):
        text, spans = "A passage. Of two.\nA question?", []
        for choice in range(3):
            start, count = len(text) + 1, int(generator.integers(1, 3))
            text += f"\n{choice} " + " ".join(generator.choice(["Yes.", "No? Why.", "the"], count))
            spans.append((start, len(text)))
        text, spans[-1] = f"{text}\nmore", (spans[-1][0], len(text) + 5)
        annotations = Annotations(spans=tuple(spans))
        documents.append(read(stacks.tokenizers["sentences"], number, text, annotations))
    assert_same(stacks, documents)


@FEW
@given(data=st.data())
def test_any_tokens_in_any_parts_are_a_loop_over_them(stacks, data):
    """Parts of one token and of all, next to one another or not, at the ends or not."""
    generator, documents = np.random.default_rng(data.draw(st.integers(0, 99))), []
    for number in range(data.draw(st.integers(2, 5))):
        places = st.lists(st.integers(0, LONGEST), min_size=2, max_size=9, unique=True)
        edges = sorted(data.draw(places))
        pairs = [*itertools.pairwise(edges)]
        pairs = pairs[:: data.draw(st.integers(1, 2))]
        size = edges[-1] + data.draw(st.integers(0, LONGEST - edges[-1]))
        ids = [generator.integers(PAD + 1, 400, each, dtype=np.int32) for each in (size, 9)]
        about = {"student_ids_S": ids[0], "teacher_ids_T": ids[1]}
        about["aligned_S"] = generator.integers(-1, 9, size, dtype=np.int32)
        parts_Q2 = np.array(pairs, np.int32)
        documents.append(Document(key=str(number), seed=number, **about, parts_Q2=parts_Q2))
    assert_same(stacks, documents)


def assert_same(stacks, documents: list[Document]) -> None:
    """States, loss and gradients, packed and by the loop."""
    stack, padded = stacks.stack, stacks.padded
    pairs = [(item, *np.nonzero(item.aligned_S >= 0)) for item in documents]
    totals = Totals(
        len(documents),
        sum(len(item.student_spans_P2) for item in documents),
        sum(len(indices) for _, indices in pairs),
    )
    kept: list[torch.Tensor] = []
    hook = stack.decoder.register_forward_hook(lambda _, __, states: kept.extend(states))
    ours = stack(collate(documents, step_seed=3, device=CPU), totals).loss
    hook.remove()
    student_BLD, real_BL = padded.states(documents, "student")
    norm = padded.llm.get_base_model().norm
    assert_close(norm(kept[0]).detach(), student_BLD[real_BL].detach())
    student_PD = torch.cat(padded.pooled(documents, "student"))
    with padded.llm.disable_adapter(), torch.no_grad():
        teacher_PD = torch.cat(padded.pooled(documents, "teacher"))
        teacher_BLD, _ = padded.states(documents, "teacher")
    loss = (1 - WEIGHT) * (student_PD - teacher_PD).square().mean()
    for row, (item, indices) in enumerate(pairs):
        errors = student_BLD[row, indices] - teacher_BLD[row, item.aligned_S[indices]]
        loss = loss + WEIGHT * errors.square().sum() / (errors.shape[1] * max(totals.aligned, 1))
    assert_close(ours.detach(), loss.detach())
    names = [*trained(stack)]
    our_gradients = torch.autograd.grad(ours, [trained(stack)[name] for name in names])
    theirs = dict(zip(names, torch.autograd.grad(loss, [padded.of(name) for name in names])))
    for name, gradient in zip(names, our_gradients):
        assert_close(gradient, theirs[name], their_name(name), largest_gradient(name, theirs))


def test_a_text_that_is_one_part_is_read_as_a_whole_one(stacks):
    """To rounding; and a text that is read whole has no parts, and costs no look-up of its own."""
    texts = ["the end", "Yes", SENTENCES["jpn_Jpan"][0]]
    embedded: list[int] = []
    hook = stacks.stack.decoder.embedding.register_forward_hook(
        lambda _, __, states: embedded.append(len(states))
    )
    losses = {}
    for kind, tokenizer in stacks.tokenizers.items():
        documents = [read(tokenizer, *each, NO_ANNOTATIONS) for each in enumerate(texts)]
        assert all((item.parts_Q2 is None) == (kind == "whole") for item in documents)
        aligned = sum(int((item.aligned_S >= 0).sum()) for item in documents)
        batch = collate(documents, step_seed=0, device=CPU)
        losses[kind] = stacks.stack(batch, Totals(3, 3, aligned)).loss.item()
    hook.remove()
    assert losses["lines"] == pytest.approx(losses["whole"], rel=1e-6)
    assert losses["sentences"] == pytest.approx(losses["whole"], rel=1e-6)
    assert embedded == 3 * embedded[:1]  # the teacher's tokens, once each time


def test_stored_states_need_one_look_up_of_what_stands_between(stacks):
    """On every rank, also where there is nothing between, or no document: ranks gather together."""
    counts: list[int] = []
    stack = stacks.stack
    hook = stack.decoder.embedding.register_forward_hook(
        lambda _, __, states: counts.append(len(states))
    )
    targets_PD = np.zeros((1, stack.projection.weight.shape[0]), np.float32)
    for text in ("a\nb\n\nc", "a", ""):
        document = read(stacks.tokenizers["lines"], 0, text, NO_ANNOTATIONS)
        document = replace(document, targets_PD=targets_PD)
        stack(collate([document], step_seed=0, device=CPU), Totals(1, 1))
    hook.remove()
    assert counts[0] >= 2 and counts[1:] == [0, 0]
