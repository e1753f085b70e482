"""Encoders of transformers' own classes in the stack, against transformers padded."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, NllbMoeConfig

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Batch, Document, Totals, collate, join
from mtllm_engine.data.batch import Pack as DocumentPack
from mtllm_engine.model.build import build_stack
from mtllm_engine.model.padded import GROUP_TOKENS, MAX_PADDING, PaddedEncoder, grouped
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.tensors import TensorFiles
from mtllm_engine.training import engine
from mtllm_engine.training.engine import PlainEngine, shard
from mtllm_engine.training.memory import estimate
from tests.support.encoders import KINDS, LONGEST, build_padded_encoder, read_by_transformers
from tests.support.padded import FEW, assert_close, attention_mask, load_llm, mean_pool
from tests.support.stages import ALONE
from tests.support.tiny import build_config, build_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=9)
EXTREMES = [1, LONGEST, 1, LONGEST - 1, LONGEST, 7, 2, 8, 8]


@dataclass(frozen=True)
class Pair:
    """The stack of one kind of encoder, and transformers' own."""

    kind: str
    config: Config
    stack: Stack
    encoder: nn.Module

    def documents(self, lengths: Sequence[int]) -> list[Document]:
        """Of any tokens, the one for padding among them."""
        generator = np.random.default_rng(sum(lengths))
        embeddings = (self.stack.encoder.embedding, self.stack.decoder.embedding)

        def draw(length: int) -> list[np.ndarray]:
            sizes = [each.num_embeddings for each in embeddings]
            return [generator.integers(0, size, length, dtype=np.int32) for size in sizes]

        return [
            Document(
                key=str(number),
                seed=number,
                student_ids_S=draw(length)[0],
                teacher_ids_T=draw(1 + length // 2)[1],
            )
            for number, length in enumerate(lengths)
        ]

    def projected(self, documents: Sequence[Document]) -> torch.Tensor:
        """Ours (S, D), packed."""
        return self.stack.projection(self.stack.encoder(pack(documents).student))

    def encoded(self, documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
        """Theirs (B, L, E), padded, and which of them are real."""
        ids_BL, real_BL = self.padded(documents)
        with torch.no_grad():
            return self.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state, real_BL

    def padded(self, documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.from_numpy(document.student_ids_S).long() for document in documents]
        pad = {"padding_value": self.encoder.config.pad_token_id}
        ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, **pad)
        return ids_BL, torch.arange(ids_BL.shape[1]) < torch.tensor([[len(row)] for row in rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    build_decoder(folder / "decoder")
    for kind in KINDS:
        build_padded_encoder(folder / kind, kind)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request, folder: Path) -> Pair:
    config = configure(folder, request.param)
    stack = build(config)
    # As in a step: neither this nor a configuration's dropout has any part in the encoder.
    stack.train()
    encoder = read_by_transformers(folder / request.param, request.param)
    return Pair(request.param, config, stack, encoder)


def configure(folder: Path, kind: str, **sections) -> Config:
    sections = {"data": {"max_length": LONGEST}, "zero": {"stage": 0}} | sections
    sections["model"] = {"encoder": str(folder / kind)} | sections.get("model", {})
    return build_config(folder, **sections)


def build(config: Config) -> Stack:
    stack, weights = build_stack(config)
    return shard(stack, weights, config, ALONE)


def pack(documents: Sequence[Document]) -> Batch:
    return collate(documents, step_seed=0, device=ALONE.device)


@FEW
@given(lengths=LENGTHS)
@example(lengths=EXTREMES)
@example(lengths=[1])
@example(lengths=[LONGEST])
def test_projected_states_are_a_padded_loops(pair: Pair, lengths: list[int]):
    documents, projection = pair.documents(lengths), pair.stack.projection
    encoded_BLE, real_BL = pair.encoded(documents)
    theirs = nn.functional.linear(encoded_BLE[real_BL], projection.weight, projection.bias)
    assert_close(pair.projected(documents).detach(), theirs.detach())


@FEW
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@example(lengths=EXTREMES, seed=3)
def test_neither_micro_batch_nor_order_changes_a_state(pair: Pair, lengths: list[int], seed: int):
    generator = np.random.default_rng(seed)
    documents = pair.documents(lengths)
    together = pair.projected(documents).detach().split([*map(len, rows(documents))])
    order = generator.permutation(len(documents))
    pieces = np.array_split(order, generator.integers(1, len(documents) + 1))
    for piece in pieces:
        apart = pair.projected([documents[number] for number in piece]).detach()
        assert_close(apart, torch.cat([together[number] for number in piece]))


def rows(documents: Sequence[Document]) -> list[np.ndarray]:
    return [document.student_ids_S for document in documents]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 3 * GROUP_TOKENS // 2), min_size=1, max_size=12))
@example(lengths=[1] * 40000)
@example(lengths=[GROUP_TOKENS // 4] * 9)
@example(lengths=[100, 88, 75, 50, 25])
def test_groups_hold_every_document_once_and_little_padding(lengths: list[int]):
    groups = grouped(lengths)
    assert sorted(sum(groups, [])) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[number] for number in group]
        run = max(sizes) * len(sizes)
        assert sizes[0] == max(sizes)
        if len(sizes) > 1:
            assert run <= GROUP_TOKENS and run - sum(sizes) <= MAX_PADDING * run
    # None that could have been larger.
    for before, group in zip(groups, groups[1:]):
        sizes = [lengths[number] for number in (*before, group[0])]
        run = sizes[0] * len(sizes)
        assert run > GROUP_TOKENS or run - sum(sizes) > MAX_PADDING * run


def test_padding_is_counted(folder: Path):
    stack = build(configure(folder, "mt5"))
    pair = Pair("mt5", configure(folder, "mt5"), stack, nn.Identity())
    assert stack.encoder.padding == 0
    pair.projected(pair.documents([10, 9, 5]))
    assert (stack.encoder.num_run, stack.encoder.num_read) == (25, 24)
    assert stack.encoder.padding == 1 / 25


def test_every_parameter_and_buffer_is_transformers_own(pair: Pair):
    ours, theirs = pair.stack.encoder.module, pair.encoder
    for values in ("named_parameters", "named_buffers"):
        mine, expected = (dict(getattr(module, values)()) for module in (ours, theirs))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in mine)


def test_an_encoder_is_no_part_of_what_is_sharded_or_trained(pair: Pair):
    stack = pair.stack
    assert not [name for name, _ in stack.named_parameters() if name.startswith("encoder")]
    assert not hasattr(stack.projection.norm_weight, "data")
    names = {name for name, each in stack.named_parameters() if each.requires_grad}
    assert {name for name in names if ".student." not in name} == {
        "projection.weight",
        "projection.bias",
    }
    assert not any(parameter.requires_grad for _, parameter in stack.encoder.named_parameters())
    stack.train()
    assert not any(module.training for module in stack.encoder.module.modules())


@pytest.mark.parametrize("kind", ["e5-small", "mt5", "mbart-50"])
def test_three_steps_are_those_of_a_padded_loop(folder: Path, kind: str):
    """In the first, loss and gradients are the same; in the last, the loss has come down."""
    config = configure(folder, kind, lora={"dropout": 0.0, "rank": 4, "alpha": 8.0})
    stack = build(config)
    pair = Pair(kind, config, stack, read_by_transformers(folder / kind, kind))
    engine, linear, llm = PlainEngine(config, stack, ALONE), nn.Linear(16, 48), load_llm(config)
    documents, losses = pair.documents(EXTREMES), []
    totals = Totals(documents=len(documents), spans=len(documents))
    for _ in range(3):
        share = engine(pack(documents), totals)
        engine.backward(share.loss)
        losses.append(share.loss.item())
        if len(losses) == 1:  # the adapters are still without effect
            with torch.no_grad():
                linear.weight.copy_(stack.projection.weight)
                linear.bias.copy_(stack.projection.bias)
            loss = distil_padded(pair, llm, linear, documents)
            loss.backward()
            assert share.loss.item() == pytest.approx(loss.item(), rel=1e-5)
            for name in ("weight", "bias"):
                gradient = getattr(linear, name).grad
                assert_close(getattr(stack.projection, name).grad, gradient, name)
        engine.step(0.02)
    assert losses[2] < losses[0]


def distil_padded(
    pair: Pair, llm: nn.Module, linear: nn.Linear, documents: Sequence[Document]
) -> torch.Tensor:
    encoded_BLE, real_BL = pair.encoded(documents)
    mask = attention_mask(real_BL, causal=False)
    student_PD = mean_pool(
        llm(inputs_embeds=linear(encoded_BLE), attention_mask=mask).last_hidden_state, real_BL
    )
    with torch.no_grad():
        taught = [
            llm(
                torch.from_numpy(document.teacher_ids_T)[None].long(),
                attention_mask=torch.zeros(1, 1, 1, len(document.teacher_ids_T)),
            ).last_hidden_state.mean(1)
            for document in documents
        ]
    return (student_PD - torch.cat(taught)).square().mean()


def test_a_projection_starts_with_states_as_large_as_the_llms_embeddings(pair: Pair):
    states_SD = pair.projected(pair.documents([LONGEST] * 30)).detach()
    embedding = pair.stack.decoder.embedding.weight
    sizes = [each.square().mean().sqrt().item() for each in (states_SD, embedding)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


@pytest.fixture
def counted(monkeypatch) -> list[tuple[Path, str, int]]:
    """All that is read of files: folder, tensor, numbers."""
    reads: list[tuple[Path, str, int]] = []
    read = TensorFiles.read

    def counting(self, name: str, start: int, stop: int) -> torch.Tensor:
        reads.append((self.folder, name, stop - start))
        return read(self, name, start, stop)

    monkeypatch.setattr(TensorFiles, "read", counting)
    return reads


@pytest.mark.parametrize("kind", ["xlm-roberta", "mbart-50", "madlad-400"])
def test_an_encoder_is_read_once_and_nothing_else_of_its_file(folder: Path, kind: str, counted):
    """Also where the projection is solved for, which needs it before the stack is sharded."""
    config = configure(folder, kind, model={"projection_init": "linear"})
    stack, weights = build_stack(config)
    encode = engine.encoder_alone(stack, weights, ALONE)
    shard(stack, weights, config, ALONE)
    of_encoder = [(name, size) for source, name, size in counted if source == folder / kind]
    parameters = dict(stack.encoder.named_parameters())
    assert len(of_encoder) == len(parameters) == len({name for name, _ in of_encoder})
    assert sum(size for _, size in of_encoder) == sum(map(torch.numel, parameters.values()))
    pair = Pair(kind, config, stack, nn.Identity())
    tokens = pack(pair.documents(EXTREMES)).student
    assert torch.equal(encode(tokens), stack.encoder(tokens))


def test_what_a_rank_holds_and_a_token_costs(folder: Path):
    config = configure(folder, "e5-small")
    stack, _ = build_stack(config)
    encoder = stack.encoder
    assert isinstance(encoder, PaddedEncoder)
    rows = {row.name: row for row in estimate(config, encoder.config, stack.decoder.spec, 4)}
    linears = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    embeddings = encoder.embedding.num_embeddings + LONGEST + 2
    small = 16 * embeddings + 2 * 16 + 2 * (4 * 16 + 24 + 16 + 4 * 16)
    assert encoder.num_weights == linears + small
    assert rows["encoder"].bytes == 4 * (linears + small)
    assert "encoder" not in rows["other frozen weights"].how
    student, teacher = stack.flops(stored_states=False)
    assert student - 2 * teacher == 2 * (linears + 16 * 48)


@pytest.mark.parametrize(
    ("kind", "limit"), [("labse", 30), ("xlm-roberta", 30), ("mbart-50", 30), ("umt5", 256)]
)
def test_a_text_may_be_as_long_as_the_encoder_has_positions(folder: Path, kind: str, limit: int):
    """Of those without positions, as the LLM."""
    room = {"max_tokens": 1000}
    build_stack(configure(folder, kind, data={"max_length": limit}, memory=room))
    side = "encoder" if limit == LONGEST else "decoder"
    with pytest.raises(
        ValueError, match=f"data.max_length={limit + 1} is above .* of model.{side}"
    ):
        build_stack(configure(folder, kind, data={"max_length": limit + 1}, memory=room))


def test_a_configuration_asks_for_nothing_but_states(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "labse", tmp_path / "labse")
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    asked |= {"return_dict": False, "chunk_size_feed_forward": 7, "dtype": "float16"}
    edit_config(tmp_path / "labse", **asked)
    pairs = [
        Pair("labse", config, build(config), nn.Identity())
        for config in (configure(each, "labse") for each in (folder, tmp_path))
    ]
    states = [pair.projected(pair.documents(EXTREMES)) for pair in pairs]
    assert torch.equal(*states) and states[0].dtype == torch.float32


def test_weights_are_held_in_the_models_dtype(folder: Path):
    stack = build(configure(folder, "umt5", model={"dtype": "bfloat16"}))
    pair = Pair("umt5", configure(folder, "umt5"), stack, nn.Identity())
    assert {each.dtype for _, each in stack.encoder.named_parameters()} == {torch.bfloat16}
    assert pair.projected(pair.documents(EXTREMES)).dtype == torch.bfloat16
    assert stack.projection.weight.dtype == torch.float32


class Asked(TorchDispatchMode):
    """Operations that wait for a GPU: a number for the host, a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags or (
            torch.Tag.dynamic_output_shape in function.tags
        ):
            self.names.add(str(function))
        return function(*args, **kwargs or {})


def test_nothing_is_asked_of_the_device(pair: Pair):
    tokens = pack(pair.documents(EXTREMES)).student
    with Asked() as asked:
        pair.stack.encoder(tokens)
    assert not asked.names
    ids_BL, real_BL = pair.padded(pair.documents(EXTREMES))
    with Asked() as asked, torch.no_grad():  # with a mask as people give it there is a question
        pair.stack.encoder.module(ids_BL, attention_mask=real_BL.long())
    assert asked.names


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rename(pattern: str, new: str) -> Callable[[dict], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        named = {name.replace(pattern, new): tensors.pop(name) for name in list(tensors)}
        assert not tensors
        tensors.update(named)

    return edit


def under(prefix: str) -> Callable[[dict], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return edit


def encoder_alone(tensors: dict[str, torch.Tensor]) -> None:
    """As `save_pretrained` of the encoder has it."""
    named = {name: tensors.pop(name) for name in list(tensors)}
    tensors |= {
        name.removeprefix("model.encoder."): each
        for name, each in named.items()
        if ".encoder." in name
    }
    tensors["embed_tokens.weight"] = named["model.shared.weight"]


LAYOUTS = {
    "labse": [
        rename(".LayerNorm.weight", ".LayerNorm.gamma"),
        rename(".LayerNorm.bias", ".LayerNorm.beta"),
    ],
    "e5-large": [under("roberta.")],
    "mbert": [rename("bert.", ""), rename("embeddings.word_embeddings", "cls.predictions.decoder")],
    "mbart-50": [encoder_alone],
    "mt5": [rename("shared.weight", "encoder.embed_tokens.weight")],
    "umt5": [rename("shared.weight", "decoder.embed_tokens.weight")],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_published_layouts_load_alike(folder: Path, tmp_path: Path, kind: str):
    shutil.copytree(folder / kind, tmp_path / kind)
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    for edit in LAYOUTS[kind]:
        edit_tensors(tmp_path / kind, edit)
    before, after = (build(configure(each, kind)).encoder for each in (folder, tmp_path))
    for (name, mine), (_, expected) in zip(before.named_parameters(), after.named_parameters()):
        assert torch.equal(mine, expected), name


def damage(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})
    )


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name: torch.zeros(2)})
    )


def change(**keys) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **keys)


def become(config) -> Callable[[Path], None]:
    return lambda folder: config.save_pretrained(folder)


WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
QUERY = "roberta.encoder.layer.1.attention.self.query.weight"
REFUSED = {
    "a missing tensor": ("mt5", lose(WO), f"mt5 has no tensor {WO}"),
    "no embedding": ("umt5", lose("shared.weight"), "has no tensor encoder.embed_tokens.weight"),
    "another shape": ("xlm-roberta", damage(QUERY, lambda x: x[:-1]), f"{QUERY} has shape"),
    "NaN": ("mt5", damage(WO, lambda x: x * math.nan), f"{WO} has values that are NaN"),
    "int8": ("mt5", damage(WO, lambda x: x.to(torch.int8)), f"{WO} has the dtype I8"),
    "relative positions": (
        "labse",
        add("encoder.layer.1.attention.self.distance_embedding.weight"),
        "nothing reads its tensor encoder.layer.1.* BertModel has no such part",
    ),
    "more layers than there are": ("labse", change(num_hidden_layers=3), "has no tensor .*layer.2"),
    "a decoder": ("labse", change(is_decoder=True), "model.encoder: .*labse: .* is a decoder"),
    "cross-attention": ("labse", change(add_cross_attention=True), "this bert is a decoder"),
    "no padding token": (
        "xlm-roberta",
        change(pad_token_id=None),
        "pad_token_id is null .*: set it",
    ),
    "heads": ("labse", change(num_attention_heads=3), "model.encoder: BertModel refuses it: "),
    "an activation": ("labse", change(hidden_act="no"), "model.encoder: BertModel refuses it: "),
    "experts": (
        "mt5",
        become(NllbMoeConfig()),
        "nllb-moe model, .* mixture of experts.*; this takes m2m_100, bert, .*umt5",
    ),
    "an LLM": ("mt5", become(LlamaConfig()), "a llama model; this takes m2m_100, bert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(folder: Path, tmp_path: Path, case: str):
    kind, spoil, message = REFUSED[case]
    shutil.copytree(folder / kind, tmp_path / kind)
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    spoil(tmp_path / kind)
    with pytest.raises(ValueError, match=message) as caught:
        build(configure(tmp_path, kind))
    assert "\n" not in str(caught.value)


def test_an_encoder_runs_the_idle_token_and_whole_micro_batches(pair: Pair):
    """A rank without documents runs the one; `join` makes the others."""
    idle = collate([], step_seed=0, device=ALONE.device)
    assert pair.stack.encoder(idle.encoder).isfinite().all()
    documents = pair.documents(EXTREMES * 3)
    packs = [DocumentPack(documents=(document,), state={}) for document in documents]
    states = [pair.projected(group).detach() for group in join(packs, 60)]
    assert len(states) > 3
    assert_close(torch.cat(states), pair.projected(documents).detach())
