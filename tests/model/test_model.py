"""The packed model against transformers and PEFT, in fp32: outputs and gradients to 1e-5 of the
largest value.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import LlamaForCausalLM, M2M100ForConditionalGeneration, M2M100Model

from benchmarks.measure import held_bytes
from mtllm_engine.config import LORA_TARGETS, Config, LoraConfig, dumps
from mtllm_engine.data.batch import Batch, Document, Tokens, Totals, collate
from mtllm_engine.model import decoder, lora
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.lora import LoraLinear, Members
from mtllm_engine.model.objective import cosine, fvu
from mtllm_engine.model.stack import Stack
from mtllm_engine.train import train
from mtllm_engine.training import checkpoint
from tests.support.machine import launch
from tests.support.padded import (
    FEW,
    PAD,
    TOLERANCE,
    assert_close,
    attention_mask,
    build,
    largest_gradient,
    load_llm,
    mean_pool,
    pad,
    randomise,
    their_name,
    trained,
)
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = build_world()
LONGEST = 64  # data.max_length
STEP_SEED = 7

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
ENCODERS = {
    "grouped": {"width": 32, "heads": 4},
    "llama3": {"width": 36, "heads": 2, "layers": 3},
    "linear": {"width": 33, "heads": 3},  # an odd width pads the sinusoids
    "tied": {"width": 32, "heads": 8},
}
DECODERS = {
    "grouped": {"width": 64, "heads": 8, "kv_heads": 2},
    "llama3": {"heads": 4, "kv_heads": 4},
    "linear": {"rope": LINEAR, "attention_bias": True, "mlp_bias": True, "max_shard_size": "100KB"},
    "tied": {
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 20,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
}
# What the builders have no option for: keys of the encoder's and the decoder's config.json
EDITS = {
    # As Llama 3 is published.
    "llama3": ({}, {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": LLAMA3}),
    "linear": ({"activation_function": "gelu", "scale_embedding": False}, {}),
    "tied": ({"max_position_embeddings": LONGEST}, {"max_position_embeddings": LONGEST}),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which checkpoints, which attention, which adapters, and whether the projection has a bias."""

    shape: str
    causal: bool = False
    bias: bool = True
    targets: tuple[str, ...] = LORA_TARGETS

    def __str__(self) -> str:
        targets = "all" if self.targets == LORA_TARGETS else "+".join(self.targets)
        return f"{self.shape}-{'causal' if self.causal else 'bidirectional'}-{targets}"


CASES = [
    Case(shape="grouped"),
    Case(shape="grouped", causal=True, targets=("q_proj", "v_proj")),
    Case(shape="llama3", causal=True),
    Case(shape="llama3", targets=("k_proj", "o_proj", "up_proj")),
    Case(shape="linear"),
    Case(shape="linear", causal=True, targets=("gate_proj", "down_proj"), bias=False),
    Case(shape="tied", causal=True),
    Case(shape="tied", targets=("v_proj", "gate_proj", "up_proj")),
]


class Pair:
    """The same weights twice: in our stack, and in transformers and PEFT."""

    def __init__(self, case: Case, stack: Stack, encoder: nn.Module, llm: peft.PeftModel) -> None:
        self.stack, self.encoder, self.llm, self.causal = stack, encoder, llm, case.causal
        width, encoder_width = stack.projection.weight.shape
        self.linear = nn.Linear(encoder_width, width, bias=case.bias)

    @property
    def trained(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Our name -> (ours, theirs) of all that is trained."""
        theirs = dict(self.llm.named_parameters())
        theirs |= {
            f"projection.{name}": parameter for name, parameter in self.linear.named_parameters()
        }
        return {
            name: (parameter, theirs[their_name(name)])
            for name, parameter in trained(self.stack).items()
        }


def build_pair(folder: Path, case: Case, *, dropout: float = 0.0) -> Pair:
    """Both sides of a case, with the same random adapters and projection."""
    model = {"causal": case.causal, "projection_bias": case.bias}
    config = configure(
        folder / case.shape, model=model, lora={"target_modules": case.targets, "dropout": dropout}
    )
    encoder = M2M100Model.from_pretrained(config.model.encoder, attn_implementation="eager").encoder
    adapters = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=list(config.lora.target_modules),
    )
    llm = peft.get_peft_model(load_llm(config), adapters).eval()
    pair = Pair(case, randomise(build(config)), encoder, llm)
    with torch.no_grad():
        for ours, theirs in pair.trained.values():
            theirs.copy_(ours)
    return pair


def configure(folder: Path, **sections) -> Config:
    return build_config(folder, zero={"stage": 0}, **sections)


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    keys = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with `encoder` and `decoder` for each shape."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for shape in DECODERS:
        sides = (
            build_encoder(folder / shape / "encoder", **ENCODERS[shape]),
            build_decoder(folder / shape / "decoder", **DECODERS[shape]),
        )
        for side, keys in zip(sides, EDITS.get(shape, ())):
            edit_config(side, **keys)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, checkpoints: Path) -> Pair:
    return build_pair(checkpoints, request.param)


LENGTHS = st.one_of(st.integers(1, LONGEST), st.sampled_from([1, LONGEST]))
SIZES = st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5)  # of student and teacher
EXTREMES = [(1, LONGEST), (LONGEST, 1), (1, 1), (LONGEST, LONGEST), (9, 30)]


def documents_of(sizes: Sequence[tuple[int, int]], stack: Stack) -> list[Document]:
    """Documents of random tokens, none of them padding."""
    generator = np.random.default_rng(len(sizes))

    def draw(size: int, embedding: nn.Embedding) -> np.ndarray:
        return generator.integers(PAD + 1, embedding.num_embeddings, size, dtype=np.int32)

    return [
        Document(
            key=str(number),
            seed=int(generator.integers(2**32)),
            student_ids_S=draw(num_student, stack.encoder.embedding),
            teacher_ids_T=draw(num_teacher, stack.decoder.embedding),
        )
        for number, (num_student, num_teacher) in enumerate(sizes)
    ]


def pack(documents: Sequence[Document], step_seed: int = STEP_SEED) -> Batch:
    return collate(documents, step_seed=step_seed, device=ALONE.device)


def decode(pair: Pair, tokens: Tokens, *, adapted: bool) -> torch.Tensor:
    """Our states of LLM tokens, finally normed by theirs (ours belongs to the objective)."""
    return pair.llm.get_base_model().norm(run_stream(pair.stack, tokens, adapted=adapted))


def totals(documents: Sequence) -> Totals:
    return Totals(documents=len(documents), spans=len(documents))


def run_stream(stack: Stack, tokens: Tokens, *, adapted: bool) -> torch.Tensor:
    stream = stack.decoder.stream(tokens, adapters="student" if adapted else None, grad=True)
    (states_TD,) = stack.decoder((stack.decoder.embedding(tokens.ids_S),), (stream,))
    return states_TD


def their_states(pair: Pair, real_BL: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    return pair.llm(
        **inputs, attention_mask=attention_mask(real_BL, pair.causal), use_cache=False
    ).last_hidden_state


@FEW
@given(sizes=SIZES)
@example(sizes=EXTREMES)
def test_encoder_and_projection(pair: Pair, sizes: list[tuple[int, int]]):
    documents = documents_of(sizes, pair.stack)
    ids_BL, real_BL = pad([document.student_ids_S for document in documents])
    with torch.no_grad():
        ours_SE = pair.stack.encoder(pack(documents).student)
        theirs_SE = pair.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state[real_BL]
        assert_close(pair.encoder.layer_norm(ours_SE), theirs_SE)
        assert_close(pair.stack.projection(ours_SE), pair.linear(theirs_SE))


@FEW
@given(sizes=SIZES)
@example(sizes=EXTREMES)
def test_bare_and_adapted_decoder(pair: Pair, sizes: list[tuple[int, int]]):
    documents = documents_of(sizes, pair.stack)
    tokens = pack(documents).teacher
    ids_BL, real_BL = pad([document.teacher_ids_T for document in documents])
    with torch.no_grad():
        adapted_TD = their_states(pair, real_BL, input_ids=ids_BL)[real_BL]
        assert_close(decode(pair, tokens, adapted=True), adapted_TD)
        with pair.llm.disable_adapter():
            bare_TD = their_states(pair, real_BL, input_ids=ids_BL)[real_BL]
        assert_close(decode(pair, tokens, adapted=False), bare_TD)
    assert (adapted_TD - bare_TD).abs().max() > 0.1, "the adapters are too weak to show"


def test_later_tokens_are_seen_unless_causal(pair: Pair):
    """Says of both sides that the two attentions are two."""
    (document,) = documents_of([(1, 12)], pair.stack)
    other_ids_T = document.teacher_ids_T.copy()
    other_ids_T[-1] += 1 if other_ids_T[-1] == PAD + 1 else -1
    other = replace(document, teacher_ids_T=other_ids_T)
    with torch.no_grad():
        ours = [decode(pair, pack([item]).teacher, adapted=True)[0] for item in (document, other)]
        padded = [pad([item.teacher_ids_T]) for item in (document, other)]
        theirs = [their_states(pair, real_BL, input_ids=ids_BL)[0, 0] for ids_BL, real_BL in padded]
    for first_D, second_D in (ours, theirs):
        assert torch.equal(first_D, second_D) == pair.causal


@FEW
@given(sizes=SIZES)
@example(sizes=EXTREMES)
def test_distillation_loss_and_gradients(pair: Pair, sizes: list[tuple[int, int]]):
    # Of one-token documents alone, q and k get no gradient.
    documents = documents_of([*sizes, (11, 17)], pair.stack)
    ours = pair.stack(pack(documents), totals(documents))
    loss, student_PD, teacher_PD = distil_padded(pair, documents)
    assert_close(ours.loss.detach(), loss.detach())
    assert_same_gradients(pair, ours.loss, loss)
    unexplained = (student_PD - teacher_PD).square().sum() / (
        teacher_PD - teacher_PD.mean(0)
    ).square().sum()
    assert fvu(ours.moments[2:]) == pytest.approx(unexplained.item(), rel=TOLERANCE)
    similarity = torch.cosine_similarity(student_PD, teacher_PD).mean()
    assert cosine(ours.moments[2:]) == pytest.approx(similarity.item(), abs=TOLERANCE)


def distil_padded(
    pair: Pair, documents: Sequence[Document]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The method as one would write it with transformers and PEFT: loss, pooled student, pooled
    teacher.
    """
    ids_BL, real_BL = pad([document.student_ids_S for document in documents])
    with torch.no_grad():
        encoded_BLE = pair.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state
    student_BLD = their_states(pair, real_BL, inputs_embeds=pair.linear(encoded_BLE))
    student_PD = mean_pool(student_BLD, real_BL)
    ids_BL, real_BL = pad([document.teacher_ids_T for document in documents])
    with torch.no_grad(), pair.llm.disable_adapter():
        teacher_PD = mean_pool(their_states(pair, real_BL, input_ids=ids_BL), real_BL)
    return (student_PD - teacher_PD).square().mean(), student_PD, teacher_PD


def assert_same_gradients(pair: Pair, our_loss: torch.Tensor, their_loss: torch.Tensor) -> None:
    ours, theirs = zip(*pair.trained.values(), strict=True)
    our_gradients = torch.autograd.grad(our_loss, ours)
    their_gradients = dict(zip(pair.trained, torch.autograd.grad(their_loss, theirs), strict=True))
    for (name, gradient), our_gradient in zip(their_gradients.items(), our_gradients, strict=True):
        assert gradient.abs().max() > 0, name
        assert_close(our_gradient, gradient, name, largest_gradient(name, their_gradients))


def test_only_adapters_and_projection_are_trained(pair: Pair):
    stack = pair.stack
    stack(pack(documents_of(EXTREMES, stack)), totals(EXTREMES)).loss.backward()
    with_gradient = {
        name for name, parameter in stack.named_parameters() if parameter.grad is not None
    }
    stack.zero_grad(set_to_none=True)
    theirs = {name for name, _ in pair.llm.named_parameters() if ".lora_" in name}
    theirs |= {f"projection.{name}" for name, _ in pair.linear.named_parameters()}
    assert {their_name(name) for name in with_gradient} == theirs
    assert with_gradient == trained(stack).keys()


def test_fresh_adapters_change_nothing(checkpoints: Path):
    """lora_B starts at 0 and lora_A, as PEFT starts it, uniform up to 1 / sqrt(its inputs)."""
    stack = build(configure(checkpoints / "grouped"))
    tokens = pack(documents_of(EXTREMES, stack)).teacher
    assert torch.equal(
        run_stream(stack, tokens, adapted=True), run_stream(stack, tokens, adapted=False)
    )
    for name, parameter in stack.named_parameters():
        if name.endswith("lora_A"):
            assert 0.9 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1


def test_streams_without_gradients_run_first(checkpoints: Path):
    """What they need for a moment then does not add to what the layer keeps."""
    stack = build(configure(checkpoints / "grouped"))
    order: list[bool] = []
    for layer in stack.decoder.layers:
        layer.gate_up.register_forward_hook(lambda *_: order.append(torch.is_grad_enabled()))
    stack(pack(documents_of(EXTREMES, stack)), totals(EXTREMES))
    assert order == [False, True] * len(stack.decoder.layers)


DROPOUT = 0.5


@pytest.fixture(scope="module")
def dropping(checkpoints: Path) -> Stack:
    return randomise(build(configure(checkpoints / "grouped", lora={"dropout": DROPOUT})))


def masks(tokens: Tokens, *, layer: int, name: str, width: int, p: float = DROPOUT) -> torch.Tensor:
    """Dropout's factors (S, D) on the input of one linear: what an identity adapter adds to an
    input of ones.
    """
    lora = LoraConfig(rank=width, alpha=float(width), dropout=p)
    number = layer * len(LORA_TARGETS) + LORA_TARGETS.index(name)
    members = Members(names=(name,), widths=(width,), numbers=(number,))
    linear = LoraLinear(width, members, {"student": lora}, torch.float32)
    with torch.no_grad():
        linear.weight.zero_()
        for matrix in linear.student[name].parameters():
            matrix.copy_(torch.eye(width))
        return linear(
            torch.ones(len(tokens.ids_S), width), adapters="student", seeds_S=tokens.seeds_S
        )


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_expectation(dropping: Stack, p: float):
    tokens = pack(documents_of(EXTREMES, dropping)).student
    mask_SD = masks(tokens, layer=0, name="q_proj", width=64, p=p)
    assert mask_SD.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert (mask_SD == 0).float().mean().item() == pytest.approx(p, abs=0.02)


def test_dropout_depends_on_step_document_token_linear_and_channel(dropping: Stack):
    """Change one, and nothing of the mask remains: no two masks are correlated."""
    (document,) = documents_of([(LONGEST, 1)], dropping)
    tokens, width = pack([document]).student, 48
    factors = {
        (layer, name): masks(tokens, layer=layer, name=name, width=width)
        for layer in range(3)
        for name in LORA_TARGETS
    }
    this = {"layer": 0, "name": "q_proj", "width": width}
    factors["step"] = masks(pack([document], STEP_SEED + 1).student, **this)
    factors["document"] = masks(pack([replace(document, seed=document.seed ^ 1)]).student, **this)
    factors["token"] = factors[0, "q_proj"].roll(1, dims=0)
    factors["channel"] = factors[0, "q_proj"].roll(1, dims=1)
    correlations = torch.corrcoef(torch.stack([mask_SD.flatten() for mask_SD in factors.values()]))
    assert (correlations - torch.eye(len(factors))).abs().max() < 0.1


def test_dropout_does_not_depend_on_the_place(dropping: Stack):
    documents = documents_of([(5, 1), (LONGEST, 1), (20, 1)], dropping)
    this = {"layer": 1, "name": "v_proj", "width": 32}
    apart = [masks(pack([document]).student, **this) for document in documents]
    assert torch.equal(masks(pack(documents).student, **this), torch.cat(apart))


def test_gradients_with_dropout_are_those_of_peft_with_the_same_masks(checkpoints: Path):
    pair = build_pair(checkpoints, CASES[0], dropout=DROPOUT)
    documents = documents_of(EXTREMES, pair.stack)
    batch = pack(documents)
    _, real_BL = pad([document.student_ids_S for document in documents])
    for name, module in pair.llm.named_modules():
        if hasattr(module, "lora_dropout"):
            *_, layer, _, linear = name.split(".")  # base_model.model.layers.0.self_attn.q_proj
            mask_SD = masks(batch.student, layer=int(layer), name=linear, width=module.in_features)
            module.lora_dropout["default"] = GivenMask(mask_SD, real_BL)
    ours = pair.stack(batch, totals(documents))
    loss, *_ = distil_padded(pair, documents)
    assert_close(ours.loss.detach(), loss.detach())
    assert_same_gradients(pair, ours.loss, loss)


class GivenMask(nn.Module):
    """Dropout by a packed mask on a padded input."""

    def __init__(self, mask_SD: torch.Tensor, real_BL: torch.Tensor) -> None:
        super().__init__()
        self.mask_BLD = torch.zeros(*real_BL.shape, mask_SD.shape[1])
        self.mask_BLD[real_BL] = mask_SD

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return x_BLD * self.mask_BLD


def test_evaluation_has_no_dropout(checkpoints: Path):
    pair = build_pair(checkpoints, CASES[0], dropout=DROPOUT)
    documents = documents_of(EXTREMES, pair.stack)
    with torch.no_grad():
        loss, *_ = distil_padded(pair, documents)
        training_loss = pair.stack(pack(documents), totals(documents)).loss
        pair.stack.eval()
        assert_close(pair.stack(pack(documents), totals(documents)).loss, loss)
    assert abs(training_loss - loss) > 0.01 * loss


@st.composite
def groupings(draw) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Sizes of documents, and their numbers in any order, cut into groups in any way; the last
    group is idle.
    """
    sizes = draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=2, max_size=6))
    order = draw(st.permutations(range(len(sizes))))
    cuts = sorted(draw(st.sets(st.integers(1, len(sizes) - 1))))
    return sizes, [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(sizes)])] + [[]]


@FEW
@given(grouping=groupings())
def test_micro_batches_do_not_matter(
    dropping: Stack, grouping: tuple[list[tuple[int, int]], list[list[int]]]
):
    sizes, groups = grouping
    documents = documents_of(sizes, dropping)
    loss, gradients = accumulate(dropping, [documents])
    split_loss, split_gradients = accumulate(
        dropping, [[documents[i] for i in group] for group in groups]
    )
    assert_close(split_loss, loss)
    for name, gradient in gradients.items():
        assert_close(split_gradients[name], gradient, name, largest_gradient(name, gradients))


def accumulate(
    stack: Stack, micro_batches: Sequence[Sequence[Document]]
) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of a step."""
    global_spans, loss = sum(map(len, micro_batches)), torch.zeros(())
    stack.zero_grad(set_to_none=True)
    for documents in micro_batches:
        share = stack(pack(documents), Totals(global_spans, global_spans)).loss
        share.backward()
        loss = loss + share.detach()
    return loss, {name: parameter.grad for name, parameter in trained(stack).items()}


def test_recomputation_gives_the_same_gradients_from_less_memory(checkpoints: Path):
    results = []
    for recompute in ("cheap", "mlp", "layer"):
        config = configure(
            checkpoints / "grouped", lora={"dropout": DROPOUT}, memory={"recompute": recompute}
        )
        stack = randomise(build(config))
        batch, counts = pack(documents_of(EXTREMES, stack)), totals(EXTREMES)
        gradients = torch.autograd.grad(stack(batch, counts).loss, trained(stack).values())
        results.append((gradients, held_bytes(lambda: stack(batch, counts).loss, ALONE)))  # noqa: B023
    saved, selected, recomputed = results
    for gradients, _ in results:
        assert all(
            torch.equal(first, second) for first, second in zip(saved[0], gradients, strict=True)
        )
    assert recomputed[1] < selected[1] / 2 < saved[1] / 3


@pytest.mark.parametrize("recompute", ["cheap", "mlp", "layer"])
def test_an_update_added_in_swiglu_is_the_same_update(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
):
    """By the GPU's kernels, which here are interpreted."""
    pytest.importorskip("triton")
    functions = {name: fused_of(name) for name in ("lora_linear", "swiglu")}
    results = []
    for place in ("linear", "swiglu"):
        config = configure(
            checkpoints / "grouped",
            model={"lora_update": place},
            lora={"dropout": DROPOUT, "target_modules": ("q_proj", "up_proj", "down_proj")},
            memory={"recompute": recompute},
        )
        stack = randomise(build(config))
        batch, counts = pack(documents_of(EXTREMES[-1:], stack)), totals(EXTREMES[-1:])
        # A GPU has these where they stand; a linear on a CPU leaves nothing.
        monkeypatch.setattr(lora, "lora_linear", counted(functions["lora_linear"], left := []))
        monkeypatch.setattr(decoder, "swiglu", functions["swiglu"])
        loss = stack(batch, counts).loss
        names = trained(stack)
        gradients = torch.autograd.grad(loss, names.values())
        assert any(left) == (place == "swiglu")
        results.append((loss, dict(zip(names, gradients, strict=True))))
    (loss, gradients), (joined_loss, joined_gradients) = results
    assert_close(joined_loss.detach(), loss.detach())
    for name, gradient in gradients.items():
        assert_close(joined_gradients[name], gradient, name, largest_gradient(name, gradients))


def fused_of(op: str) -> Callable:
    return getattr(importlib.import_module(f"mtllm_engine.kernels.{op}.fused"), op)


def counted(function: Callable, left: list[bool]) -> Callable:
    """Notes of every call with `deferred` whether it left an update."""

    def call(*args, deferred: bool):
        result = function(*args, deferred=deferred)
        left.append(deferred and result[1] is not None)
        return result

    return call


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("k_proj", "down_proj")], ids="+".join)
def test_peft_opens_a_checkpoint(checkpoints: Path, tmp_path: Path, targets: tuple[str, ...]):
    config = configure(
        checkpoints / "llama3",
        run={"dir": str(tmp_path / "run")},
        data={"train": str(build_corpus(tmp_path / "train", 24))},
        lora={"target_modules": targets, "alpha": 6.0, "rslora": len(targets) == 2},
        optim={"steps": 2, "lr": 0.05, "warmup_ratio": 0.0},
    )
    train(config, ALONE)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    stack = build(config).eval()
    for name, tensors in checkpoint.load_tensors(saved).items():
        stack.get_parameter(name).data.copy_(tensors["value"])
    llm = peft.PeftModel.from_pretrained(load_llm(config), saved)
    pair = Pair(Case(shape="llama3", targets=targets), stack, nn.Identity(), llm)
    documents = documents_of(EXTREMES, stack)
    ids_BL, real_BL = pad([document.teacher_ids_T for document in documents])
    with torch.no_grad():
        ours_TD = decode(pair, pack(documents).teacher, adapted=True)
        bare_TD = decode(pair, pack(documents).teacher, adapted=False)
        assert_close(ours_TD, their_states(pair, real_BL, input_ids=ids_BL)[real_BL])
    assert (ours_TD - bare_TD).abs().max() > 0.1, "two steps did not show"


def save_one_side(model: nn.Module, folder: Path) -> None:
    """The encoder without its decoder, or the LLM without its head."""
    getattr(model.model, "encoder", model.model).save_pretrained(folder)


FORMATS: dict[str, Callable[[nn.Module, Path], object]] = {
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="40KB"),
    "base model": lambda model, folder: model.model.save_pretrained(folder),
    "one side": save_one_side,
    "tied under the last name": lambda model, folder: save_model(
        model, folder / "model.safetensors"
    ),
    "pytorch_model.bin": lambda model, folder: torch.save(
        model.state_dict(), folder / "pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_of_a_checkpoint_loads_alike(checkpoints: Path, tmp_path: Path, form: str):
    source = checkpoints / "tied"
    for side, kind in (("encoder", M2M100ForConditionalGeneration), ("decoder", LlamaForCausalLM)):
        shutil.copytree(
            source / side, tmp_path / side, ignore=shutil.ignore_patterns("model.safetensors")
        )
        FORMATS[form](kind.from_pretrained(source / side), tmp_path / side)
    assert (len(list((tmp_path / "decoder").glob("model-*-of-*"))) > 1) == (form == "sharded")
    expected = dict(build(configure(source)).named_parameters())
    loaded = dict(build(configure(tmp_path)).named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def lose_tensor(side: str, name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / side, lambda tensors: tensors.pop(name))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(side: str, **keys) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder / side, **keys)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


def cut_file(folder: Path) -> None:
    path = folder / "decoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lose_shard(folder: Path) -> None:
    shard_decoder(folder)
    next((folder / "decoder").glob("model-00002-of-*")).unlink()


def cut_index(folder: Path) -> None:
    shard_decoder(folder)
    (folder / "decoder" / "model.safetensors.index.json").write_text("{")


def shard_decoder(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "decoder")
    (folder / "decoder" / "model.safetensors").unlink()
    model.save_pretrained(folder / "decoder", max_shard_size="100KB")


def swap_models(folder: Path) -> None:
    (folder / "encoder").rename(folder / "other")
    (folder / "decoder").rename(folder / "encoder")
    (folder / "other").rename(folder / "decoder")


NO_FLOATS = [torch.float8_e4m3fn, torch.int8, torch.int32, torch.complex64, torch.bool]


def retype(side: str, name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """A weight of another dtype, with what FP8 and int8 checkpoints keep beside it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name].to(dtype), f"{name}_scale": torch.ones(1)}

    return lambda folder: edit_tensors(folder / side, edit)


def retype_bin(folder: Path) -> None:
    """The same in a file of torch."""
    path = folder / "decoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    torch.save(tensors, folder / "decoder" / "pytorch_model.bin")
    path.unlink()


def quantise(folder: Path) -> None:
    """One weight as FP8 checkpoints store them, with its scale beside it."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit = {name: torch.ones(128, 64).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    edit_tensors(folder / "decoder", lambda tensors: tensors.update(edit))
    edit_config(folder / "decoder", quantization_config={"quant_method": "compressed-tensors"})


def no_padding(folder: Path) -> None:
    path = folder / "encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))


MISSING = [
    ("encoder", "model.encoder.layers.0.self_attn.q_proj.weight"),
    ("encoder", "model.encoder.layers.1.fc1.bias"),
    ("encoder", "model.encoder.layer_norm.weight"),
    ("decoder", "model.embed_tokens.weight"),
    ("decoder", "model.layers.0.self_attn.q_proj.weight"),
    ("decoder", "model.layers.0.input_layernorm.weight"),
    ("decoder", "model.layers.2.mlp.up_proj.weight"),
    ("decoder", "model.norm.weight"),
]
HALF_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4}
AXIAL = {"rope_type": "axial", "rope_theta": 1e4, "factor": 2.0}
ERRORS = {  # what is done to a folder with an encoder and a decoder, and what the error says
    f"no {name} in the {side}": (
        lose_tensor(side, name),
        f"/{side} has no tensor .*{name.rsplit('.', 2)[1]}",
    )
    for side, name in MISSING
} | {
    "no shared embedding": (
        lose_tensor("encoder", "model.shared.weight"),
        "/encoder has no tensor .*embed_tokens",
    ),
    "no encoder": (remove("encoder"), "/encoder is neither a folder nor a model"),
    "no decoder": (remove("decoder"), "/decoder is neither a folder nor a model"),
    "no config.json": (remove("decoder/config.json"), "model.decoder: .*config.json"),
    "no weights": (
        remove("decoder/model.safetensors"),
        "/decoder has neither model.safetensors nor",
    ),
    "a cut file": (cut_file, "/decoder/model.safetensors cannot be read"),
    "a lost shard": (
        lose_shard,
        "/decoder lacks model-00002-of-.*, which model.safetensors.index.json names",
    ),
    "models swapped": (
        swap_models,
        "model.decoder: .*/decoder is a m2m_100 model; this takes llama",
    ),
    "another family": (
        change("decoder", model_type="gpt_neox"),
        "/decoder is a gpt_neox model, .* side by side; this takes llama, mistral, ",
    ),
    "encoder's activation": (
        change("encoder", activation_function="gelu_new"),
        "model.encoder: activation 'gelu_new'",
    ),
    "decoder's activation": (
        change("decoder", hidden_act="gelu"),
        "model.decoder: .*/decoder: activation 'gelu' is not supported",
    ),
    "rope type": (
        change("decoder", rope_parameters=AXIAL),
        "model.decoder: .*/decoder: rope_type 'axial' is not supported",
    ),
    "a layer too many": (
        change("decoder", num_hidden_layers=4),
        "/decoder has no tensor model.layers.3.",
    ),
    "another width": (
        change("decoder", intermediate_size=100),
        r"layers.0.mlp.gate_proj.* has shape \(256, 64\)",
    ),
    "encoder's positions": (
        change("encoder", max_position_embeddings=63),
        "max_length=64 is above .* model.encoder",
    ),
    "decoder's positions": (
        change("decoder", max_position_embeddings=63),
        "max_length=64 is above .* model.decoder",
    ),
    "a key's type": (change("decoder", hidden_size="64"), "model.decoder: .*hidden_size"),
    "decoder's heads": (change("decoder", num_attention_heads=5), "model.decoder: .*heads"),
    "encoder's heads": (change("encoder", encoder_attention_heads=5), "model.encoder: .*heads"),
    "rope's keys": (change("decoder", rope_parameters=HALF_LLAMA3), "model.decoder: .*rope"),
    "a cut index": (cut_index, "/decoder/model.safetensors.index.json"),
    "quantised weights": (
        quantise,
        r"model.decoder: .*/decoder does not go in: .* quantised \(compressed-tensors\); name",
    ),
    "a mixture of experts": (
        change("decoder", model_type="mixtral"),
        "/decoder is a mixtral model, which does not go in: it is a mixture of experts.*; this tak",
    ),
    "an encoder of experts": (
        change("encoder", model_type="nllb-moe"),
        "/encoder is a nllb-moe model, which does not go in: it is a mixture of experts",
    ),
    "no padding": (
        no_padding,
        "model.encoder: pad_token_id is null in its config.json, and positions count from it",
    ),
    "only the head, untied": (
        lose_tensor("decoder", "model.embed_tokens.weight"),
        "/decoder has no tensor model.embed_tokens.weight",
    ),
    "int8 in pytorch_model.bin": (
        retype_bin,
        "/decoder/pytorch_model.bin: model.norm.weight has the dtype torch.int8",
    ),
}
ERRORS |= {
    f"{dtype} in the {side}": (
        retype(side, name, dtype),
        f"/{side}/model.safetensors: {name} has the dtype [A-Z0-9_]+; this takes float32",
    )
    for side, name in (("encoder", MISSING[0][1]), ("decoder", "model.layers.2.mlp.up_proj.weight"))
    for dtype in NO_FLOATS
}


@pytest.mark.parametrize("damage, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_load_is_named_in_one_line(
    checkpoints: Path, tmp_path: Path, damage: Callable, message: str
):
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        build_stack(configure(tmp_path))
    assert "\n" not in str(caught.value)


def test_attention_is_as_the_llm_was_trained_with(checkpoints: Path, tmp_path: Path):
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path / "decoder", is_causal=False)
    with pytest.raises(ValueError, match="model.causal=true, and model.decoder was trained with"):
        build_stack(configure(tmp_path, model={"causal": True}))
    build_stack(configure(tmp_path, model={"causal": False}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=4)
def test_a_weight_that_is_not_finite_is_named(
    checkpoints: Path, tmp_path_factory, value: float, dtype: torch.dtype, data: st.DataObject
):
    """Wherever in its tensor it is, as the stack is filled."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(checkpoints / "grouped", folder, dirs_exist_ok=True)
    side, name = data.draw(st.sampled_from(MISSING))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        whole = tensors[name].to(dtype)
        whole.view(-1)[data.draw(st.integers(0, whole.numel() - 1))] = value
        tensors[name] = whole

    edit_tensors(folder / side, damage)
    with pytest.raises(ValueError, match=f"/{side}: {name} has values that are NaN or infinite"):
        build(configure(folder))


def test_the_rank_that_meets_it_takes_the_others_along(checkpoints: Path, tmp_path: Path):
    """All leave, and one of them tells it."""
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    name = "model.layers.2.mlp.up_proj.weight"  # its end is in the second rank's slice alone
    edit_tensors(
        tmp_path / "decoder", lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan"))
    )
    build_corpus(tmp_path / "train", 24)
    (tmp_path / "run.toml").write_text(dumps(build_config(tmp_path)))
    with pytest.raises(AssertionError) as failed:
        launch(2, "mtllm_engine.train", tmp_path / "run.toml")
    output = str(failed.value)
    assert output.count("error:") == 1 and 'File "' not in output
    assert f"/decoder: {name} has values that are NaN or infinite" in output


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_preferred_to_an_older_index(checkpoints: Path, tmp_path: Path, form: str):
    """As transformers prefers it."""
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "decoder"
    old = {name: each + 1 for name, each in load_file(folder / "model.safetensors").items()}
    if form == "model.safetensors":
        save_file(old, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    else:
        torch.save(load_file(folder / "model.safetensors"), folder / form)
        (folder / "model.safetensors").unlink()
        torch.save(old, folder / "pytorch_model-00001-of-00001.bin")
    shard, ending = form.split(".")
    weight_map = dict.fromkeys(old, f"{shard}-00001-of-00001.{ending}")
    (folder / f"{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = configure(tmp_path)
    theirs = load_llm(config).get_input_embeddings().weight
    assert torch.equal(build(config).decoder.embedding.weight, theirs)
    assert not torch.equal(old["model.embed_tokens.weight"], theirs)


def test_positions_follow_the_padding_id(checkpoints: Path, tmp_path: Path):
    shutil.copytree(checkpoints / "grouped", tmp_path / "grouped")
    edit_config(tmp_path / "grouped" / "encoder", pad_token_id=0)
    pair = build_pair(tmp_path, CASES[0])
    documents = documents_of([(9, 1)], pair.stack)
    ids_BL, real_BL = pad([document.student_ids_S for document in documents])
    with torch.no_grad():
        theirs_SE = pair.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state[real_BL]
        assert_close(
            pair.encoder.layer_norm(pair.stack.encoder(pack(documents).student)), theirs_SE
        )


@pytest.mark.parametrize(
    "side, build_side", [("encoder", build_encoder), ("decoder", build_decoder)]
)
def test_a_larger_vocabulary_than_the_model_has_is_refused(
    checkpoints: Path, tmp_path: Path, side: str, build_side: Callable
):
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    config = configure(tmp_path)
    stack, _ = build_stack(config)
    largest = getattr(stack, side).embedding.num_embeddings - 1
    build_tokenizer(config, stack)
    build_side(tmp_path / side, vocab_size=largest)  # one too few
    with pytest.raises(
        ValueError,
        match=rf"model.{side}: the tokenizer has ids up to {largest}, the model {largest} ",
    ):
        build_tokenizer(config, build_stack(config)[0])


def test_an_encoder_without_its_tokenizer_is_refused(checkpoints: Path, tmp_path: Path):
    shutil.copytree(checkpoints / "grouped", tmp_path, dirs_exist_ok=True)
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    config = configure(tmp_path)
    with pytest.raises(ValueError, match="/encoder"):
        build_tokenizer(config, build_stack(config)[0])
