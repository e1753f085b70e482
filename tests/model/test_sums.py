"""Sums of adapters against PEFT with all of them active at once; what a sum is refused for."""

import copy
import itertools
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from mtllm_engine.config import FOLLOWING, LORA_TARGETS, Config, from_dict
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.model.build import build_stack
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.sums import AdapterSum, settle
from mtllm_engine.model.weights import checkpoint_tensors, saved_name
from mtllm_engine.training.engine import shard
from tests.support.adapters import write_adapters, write_head, write_projection
from tests.support.padded import attention_mask, load_llm
from tests.support.tiny import build_config, build_decoder, build_encoder, build_world

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = build_world()
WIDTH, ENCODER_WIDTH = 32, 16
IDS_T = np.random.default_rng(0).integers(2, 400, 17, dtype=np.int32)
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Config:
    """A configuration over a tiny encoder and LLM, whose [lora] follows what is added up."""
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder", width=ENCODER_WIDTH, layers=1)
    build_decoder(folder / "decoder", width=WIDTH, layers=2)
    config = build_config(folder, zero={"stage": 0}, lora={"dropout": 0.0})
    return replace(config, lora=replace(config.lora, **FOLLOWING))


@pytest.fixture(scope="module")
def llm(models: Config) -> LlamaModel:
    return load_llm(models).eval()


def summed(models: Config, folders: Sequence[Path], seed: int = 0, **lora: Any) -> Config:
    """The LLM alone, with adapters of all these folders."""
    model = replace(models.model, init_from=tuple(map(str, folders)))
    objective = replace(models.objective, kind="finetune", reader="llm")
    run, lora_config = replace(models.run, seed=seed), replace(models.lora, **lora)
    return replace(models, model=model, objective=objective, run=run, lora=lora_config)


def filled(config: Config, *, learns: bool) -> Stack:
    stack, weights = build_stack(config, learns=learns)
    return shard(stack, weights, config, ALONE)


@torch.no_grad()
def our_states(stack: Stack) -> torch.Tensor:
    """(T, D), normed by nobody."""
    decoder = stack.eval().decoder
    document = Document(key="0", seed=0, student_ids_S=IDS_T, teacher_ids_T=IDS_T)
    tokens = collate([document], step_seed=0, device=ALONE.device).teacher
    stream = decoder.stream(tokens, adapters="student", grad=False)
    return decoder((decoder.embedding(tokens.ids_S),), (stream,))[0]


@torch.no_grad()
def their_states(llm: LlamaModel, folders: Sequence[Path]) -> tuple[torch.Tensor, float]:
    """(T, D) of PEFT's model with the adapters of all folders active, after the last norm, fp64;
    and how far its own fp32 is from that.
    """
    names = [f"part{number}" for number in range(len(folders))]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(llm), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(folder, name)
    model.base_model.set_adapter(names)
    ids_BL = torch.from_numpy(IDS_T).long()[None]
    mask = attention_mask(torch.ones_like(ids_BL).bool(), causal=False)
    options = {"input_ids": ids_BL, "attention_mask": mask, "use_cache": False}
    rounded_TD, exact_TD = model.eval()(**options)[0][0], model.double()(**options)[0][0]
    return exact_TD, (rounded_TD - exact_TD).abs().max().item()


@torch.no_grad()
def assert_same_states(
    llm: LlamaModel, ours_TD: torch.Tensor, theirs: tuple[torch.Tensor, float]
) -> None:
    """max|ours - theirs| <= 1e-6 max|theirs|, and what rounding makes of theirs."""
    exact_TD, rounding = theirs
    error = (llm.norm(ours_TD) - exact_TD).abs().max()
    assert error <= 1e-6 * exact_TD.abs().max() + 2 * rounding, f"off by {error}"


TARGETS = st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True)
PART = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 2, 3, 4, 16]),
        "lora_alpha": st.sampled_from([0.5, 3, 4, 8, 17]),
        "use_rslora": st.booleans(),
        "target_modules": TARGETS,
    }
)
PARTS = st.lists(PART, min_size=2, max_size=3)
USUAL = {"use_rslora": False, "target_modules": list(LORA_TARGETS)}
STAGE1, TASK = ({"r": rank, "lora_alpha": alpha, **USUAL} for rank, alpha in ((4, 8), (16, 32)))


def write_parts(
    folder: Path, llm: LlamaModel, parts: Sequence[dict[str, Any]], **options: Any
) -> list[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    numbered = enumerate(parts)
    return [
        write_adapters(folder / str(index), llm, seed=index, **part, **options)
        for index, part in numbered
    ]


def scale_of(part: dict[str, Any]) -> float:
    rank = part["r"]
    return part["lora_alpha"] / (math.sqrt(rank) if part["use_rslora"] else rank)


@settings(max_examples=8)
@given(parts=PARTS, order=st.randoms(use_true_random=False))
@example(parts=[STAGE1, TASK], order=None)
@example(parts=[TASK, STAGE1 | {"target_modules": ["q_proj"]}], order=None)
def test_states_are_those_of_peft_with_all_adapters_active(
    models: Config, llm: LlamaModel, tmp_path_factory, parts: list[dict], order
):
    """Evaluated, trained, and trained beside adapters that do not learn; in any order."""
    folders = write_parts(tmp_path_factory.getbasetemp() / "states", llm, parts)
    theirs = their_states(llm, folders)
    shuffled = order.sample(folders, len(folders)) if order else folders
    for options in ({"learns": False}, {"learns": True}, {"learns": True, "train": "first"}):
        learns = options.pop("learns")
        ours_TD = our_states(filled(summed(models, shuffled, **options), learns=learns))
        assert_same_states(llm, ours_TD, theirs)


def total_of(folders: Sequence[Path], scale: float, seed: int | None = None) -> AdapterSum:
    return AdapterSum(list(map(checkpoint_tensors, folders)), scale=scale, seed=seed)


@settings(max_examples=15)
@given(parts=PARTS, dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
@example(parts=[STAGE1, TASK], dtype=torch.float32, data=None)
def test_any_ranks_read_the_same_bits_which_are_the_parts(
    llm: LlamaModel, tmp_path_factory, parts: list[dict], dtype: torch.dtype, data
):
    """A as they are, each B times its scale over the sum's: exact where that is 1, else to fp32's
    rounding; and 0 where a part has no adapter.
    """
    folder = tmp_path_factory.getbasetemp() / "slices"
    folders = write_parts(folder, llm, parts, dtype=dtype)
    saved = [load_file(each / TENSORS) for each in folders]
    scale = data.draw(st.sampled_from([*map(scale_of, parts), 0.7])) if data else 2.0
    total = total_of(folders, scale)
    assert set(total.names) == set().union(*saved)
    for name in total.names:
        shape, matrix = total.shape(name), next(part[name] for part in saved if name in part)
        across = 1 if "lora_B" in name else 0
        ranks = [part["r"] for part in parts]
        assert shape[across] == sum(ranks) and shape[1 - across] == matrix.shape[1 - across]
        whole = total.read(name, 0, math.prod(shape))
        assert whole.dtype == torch.float32
        for cuts in partitions(len(whole), data):
            pieces = [total.read(name, *each) for each in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(pieces), whole)
        for part, own, block in zip(parts, saved, whole.view(shape).split(ranks, across)):
            if name not in own:
                assert not block.any()
                continue
            ratio = scale_of(part) / scale if across else 1.0
            exact = own[name].double() * ratio
            assert ratio != 1 or torch.equal(block, own[name].float())
            assert ((block - exact).abs() <= 2e-7 * exact.abs()).all()


def partitions(size: int, data) -> list[list[int]]:
    """As ZeRO-3 slices a tensor over 1 to 4 ranks, the last one's shorter; and any other way."""
    even = [
        [min(rank * -(-size // ranks), size) for rank in range(ranks + 1)] for ranks in range(1, 5)
    ]
    drawn = data.draw(st.sets(st.integers(0, size), max_size=3)) if data else set()
    return [*even, sorted({0, size} | drawn)]


def adapters_of(stack: Stack) -> dict[str, torch.Tensor]:
    """The student's matrices with what of them does not learn, by PEFT's names."""
    parameters = {
        name: parameter.detach()
        for name, parameter in stack.named_parameters()
        if ".student." in name
    }
    matrices = {}
    for name, value in parameters.items():
        if ".lora_" in name:
            frozen = parameters.get(name.replace(".lora_", ".frozen_"))
            halves = [value] if frozen is None else [value, frozen]
            matrices[saved_name(name)] = torch.cat(halves, 1 if name.endswith("_B") else 0)
    return matrices


APART = [{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}]
APART += [{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}]
APART += [{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}]


@pytest.mark.parametrize("train", ["all", "first"])
def test_what_a_part_lacks_is_drawn_where_it_learns(
    models: Config, llm: LlamaModel, tmp_path: Path, train: str
):
    """A from run.seed, as PEFT draws one, each its own; B = 0; of what does not learn A too."""
    folders = write_parts(tmp_path, llm, APART)
    saved = [load_file(each / TENSORS) for each in folders]
    made = {
        seed: adapters_of(filled(summed(models, folders, seed, train=train), learns=True))
        for seed in (0, 1)
    }
    again = adapters_of(filled(summed(models, folders, 0, train=train), learns=True))
    still = adapters_of(filled(summed(models, folders, 0), learns=False))
    drawn = []
    for name, matrix in made[0].items():
        across = 1 if "lora_B" in name else 0
        assert torch.equal(matrix, again[name])
        halves = [each[name].split([3, 2, 2], across) for each in (made[0], made[1], still)]
        for number, (own, half, other, untrained) in enumerate(zip(saved, *halves)):
            learns = train == "all" or number == 0
            if name in own:
                assert torch.equal(half, own[name]) and torch.equal(untrained, own[name])
            elif across or not learns:
                assert not half.any() and not untrained.any()
            else:
                bound = matrix.shape[1] ** -0.5
                assert half.abs().max() <= bound and half.std() > bound / 3
                assert not torch.equal(half, other) and not untrained.any()
                drawn.append(half.flatten().tolist())
    # up: B, C; down: A, C; in two layers; no two are alike.
    assert len(drawn) == (8 if train == "all" else 2)
    assert len({number for numbers in drawn for number in numbers}) == sum(map(len, drawn))
    assert {name.split(".")[-3] for name in made[0]} == {"q_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("train", ["all", "first"])
def test_what_learns_of_a_sum(models: Config, llm: LlamaModel, tmp_path: Path, train: str):
    """Everything, or the first part's half of every linear that any part has."""
    folders = write_parts(tmp_path, llm, APART)
    stack = filled(summed(models, folders, train=train), learns=True)
    shapes = {n: tuple(p.shape) for n, p in stack.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 3 * 2 and all(".lora_" in name for name in shapes)
    ranks = {shape[1 if name.endswith("_B") else 0] for name, shape in shapes.items()}
    assert ranks == {7 if train == "all" else 3}
    frozen = {name for name, _ in stack.named_parameters() if ".frozen_" in name}
    assert len(frozen) == (0 if train == "all" else 12)


def test_settled_is_what_the_adapters_have(models: Config, llm: LlamaModel, tmp_path: Path):
    """Also where [lora] says the same; the scale is the first part's, or that of [lora]."""
    folders = write_parts(tmp_path, llm, [STAGE1 | {"use_rslora": True}, TASK])
    lora = settle(summed(models, folders)).lora
    assert (lora.rank, lora.scale) == (20, pytest.approx(8 / 2))
    assert set(lora.target_modules) == set(LORA_TARGETS)
    same = settle(summed(models, folders, rank=20, target_modules=LORA_TARGETS)).lora
    assert same == lora
    given_lora = settle(summed(models, folders, alpha=5.0)).lora
    assert (given_lora.rank, given_lora.alpha, given_lora.scale) == (20, 5.0, 0.25)
    alone = summed(models, folders[:1], rank=4, alpha=8.0, target_modules=LORA_TARGETS)
    assert settle(alone) == alone
    theirs = their_states(llm, folders)
    ours_TD = our_states(filled(summed(models, folders, alpha=5.0), learns=True))
    assert_same_states(llm, ours_TD, theirs)


def test_lora_is_left_out_of_the_file(models: Config, llm: LlamaModel, tmp_path: Path):
    """All of it, or some of its keys."""
    folders = write_parts(tmp_path, llm, [STAGE1, TASK])
    tree = {
        "run": {"dir": str(tmp_path)},
        "model": {"encoder": models.model.encoder, "decoder": models.model.decoder},
        "data": {"train": "x", "lanes": 1, "pack_documents": 1, "max_length": 8},
        "optim": {"steps": 1},
    }
    tree["model"]["init_from"] = list(map(str, folders))
    lora = settle(from_dict(tree)).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (20, 40.0, 0.05)
    lora = settle(from_dict(tree | {"lora": {"dropout": 0.0, "alpha": 20.0}})).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (20, 20.0, 0.0)
    tree["model"]["init_from"] = str(folders[0])
    assert from_dict(tree).lora.rank == 16 and from_dict(tree).model.init_from == (str(folders[0]),)
    tree["model"]["init_from"] = ""
    assert from_dict(tree).model.init_from == ()


def refused(config: Config, *, learns: bool = True) -> str:
    """The one line that a sum is refused with, when it is built and filled."""
    with pytest.raises(ValueError) as error:
        filled(config, learns=learns)
    assert "\n" not in str(error.value)
    return str(error.value)


def of_the_stack(config: Config) -> Config:
    return replace(config, objective=replace(config.objective, reader="stack"))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", ["head", "projection"])
def test_two_heads_or_projections_are_both_named(
    models: Config, llm: LlamaModel, tmp_path: Path, kind: str, learns: bool
):
    folders = write_parts(tmp_path, llm, [STAGE1, TASK])
    for folder in folders:
        if kind == "head":
            write_head(folder, 7, WIDTH)
        else:
            write_projection(folder, WIDTH, ENCODER_WIDTH)
    config = of_the_stack(summed(models, folders))
    both = f"{folders[0]} and {folders[1]} have a {kind} each"
    for train in ("all", "first"):
        changed = replace(config, lora=replace(config.lora, train=train))
        assert both in refused(changed, learns=learns)


@pytest.mark.parametrize("train", ["all", "first"])
@pytest.mark.parametrize("owner", [0, 1])
def test_projection_and_head_are_those_of_the_part_that_has_them(
    models: Config, llm: LlamaModel, tmp_path: Path, owner: int, train: str
):
    """Of either part; a head that nobody reads is left out."""
    folders = write_parts(tmp_path, llm, [STAGE1, TASK])
    write_projection(folders[owner], WIDTH, ENCODER_WIDTH)
    write_head(folders[1 - owner], 7, WIDTH)
    stack = filled(of_the_stack(summed(models, folders, train=train)), learns=True)
    saved = load_file(folders[owner] / "projection.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(stack.get_parameter(f"projection.{name}").detach(), saved[name])
    assert not any("head" in name for name, _ in stack.named_parameters())


def other_llm(folder: Path, **sizes: int) -> LlamaModel:
    options = {"width": WIDTH, "layers": 2} | sizes
    return LlamaModel.from_pretrained(build_decoder(folder, **options))


SPOILED = {
    "no adapters": "has no adapter_model.safetensors",
    "not there": "has no adapter_model.safetensors",
    "no configuration": "adapter_config.json cannot be read",
    "no scale": "lora_alpha=0",
    "another width": "does not fit|has shape",
    "fewer layers": r"layers\.1\.|has shape",
    "more layers": r"nothing reads its tensor .*layers\.2\.",
    "another rank than it says": r"layers\.1\.mlp\.up_proj\.lora_B\.weight .*does not fit",
    "not finite": "NaN or infinite",
    "a cut file": TENSORS,
    "a tensor of another kind": "nothing reads its tensor .*lora_magnitude_vector",
    "a linear that it does not name": "nothing reads its tensor .*_proj",
}


@pytest.mark.parametrize("train", ["all", "first"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_part_that_does_not_fit_is_named(
    models: Config, llm: LlamaModel, tmp_path: Path, spoiled: str, number: int, train: str
):
    folders = write_parts(tmp_path / "parts", llm, [STAGE1, TASK])
    folder, keys = folders[number], (STAGE1, TASK)[number]
    tensors = load_file(folder / TENSORS)
    name = "base_model.model.layers.1.mlp.up_proj.lora_B.weight"
    if spoiled == "no scale":
        write_adapters(folder, llm, **keys | {"lora_alpha": 0})
    elif spoiled == "a linear that it does not name":
        peft.LoraConfig(**keys | {"target_modules": ["q_proj"]}).save_pretrained(folder)
    elif spoiled == "no adapters":
        (folder / TENSORS).unlink()
        write_projection(folder, WIDTH, ENCODER_WIDTH)
    elif spoiled == "no configuration":
        (folder / "adapter_config.json").unlink()
    elif spoiled == "another width":
        write_adapters(folder, other_llm(tmp_path / "other", width=48), **keys)
    elif "layers" in spoiled:
        layers = 1 if spoiled.startswith("fewer") else 3
        write_adapters(folder, other_llm(tmp_path / "other", layers=layers), **keys)
    elif spoiled == "another rank than it says":
        save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / TENSORS)
    elif spoiled == "not finite":
        tensors[name][3, 1] = math.nan
        save_file(tensors, folder / TENSORS)
    elif spoiled == "a cut file":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    elif spoiled == "not there":
        shutil.rmtree(folder)
    else:
        magnitude = name.replace("lora_B", "lora_magnitude_vector")
        save_file(tensors | {magnitude: torch.ones(4)}, folder / TENSORS)
    message = refused(summed(models, folders, train=train))
    assert re.search(SPOILED[spoiled], message) and str(folder) in message


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 16}, "lora.rank"),
        ({"rank": 4}, "lora.rank"),
        ({"target_modules": ("q_proj",)}, "lora.target_modules"),
    ],
)
def test_adapters_that_are_not_the_sums_are_refused(
    models: Config, llm: LlamaModel, tmp_path: Path, lora: dict, message: str
):
    folders = write_parts(tmp_path, llm, [STAGE1, TASK])
    for train in ("all", "first"):
        assert message in refused(summed(models, folders, train=train, **lora))
