"""Adapters that are merged first: the LLM's tensors are those of PEFT's `merge_and_unload`, the
same bits in whatever slices they are read, or what is not added is named.
"""

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Phi3Config,
    Phi3ForCausalLM,
)

from mtllm_engine.config import LORA_TARGETS
from mtllm_engine.model.merge import Merged, chain_fingerprint, find_adapters, open_decoder
from mtllm_engine.model.tensors import TensorFiles
from tests.support.adapters import make_adapters
from tests.support.machine import threads
from tests.support.tiny import build_config, build_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
FILE, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
AROUND = {
    "SEQ_CLS": LlamaForSequenceClassification,
    "TOKEN_CLS": LlamaForTokenClassification,
}
MADE_ON = ("LLM", "words", "labels")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """Its MLP is 320 wide: more than a block of rows, and no multiple of one."""
    return build_decoder(tmp_path_factory.mktemp("llm") / "decoder", width=160, layers=2)


@pytest.fixture(scope="module")
def model(decoder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(decoder)


def around(model: LlamaForCausalLM, made_on: str) -> nn.Module:
    """The LLM in a model of one of `MADE_ON`, their weights shared."""
    if made_on == "labels":
        labels = LlamaForSequenceClassification(model.config)
        labels.model = model.model
        return labels
    return model if made_on == "words" else model.model


def make(model: LlamaForCausalLM, folder: Path, made_on: str = "LLM", **keys: Any) -> Path:
    return make_adapters(around(copy.deepcopy(model), made_on), folder, **(PLAIN | keys))


@pytest.fixture
def adapters(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    return make(model, tmp_path / "adapters")


def merged_by_peft(model: LlamaForCausalLM, chain: list[tuple[str, Path]]) -> dict[str, Any]:
    model = copy.deepcopy(model)
    for made_on, folder in chain:
        peft.PeftModel.from_pretrained(around(model, made_on), folder).merge_and_unload()
    return model.state_dict()


def assert_merged(decoder: Path, model: LlamaForCausalLM, chain: list[tuple[str, Path]]) -> None:
    ours = Merged(TensorFiles(decoder), [folder for _, folder in chain])
    theirs = merged_by_peft(model, chain)
    for name in ours.names:
        shape = ours.shape(name)
        value = ours.read(name, 0, math.prod(shape)).view(shape)
        assert (value - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name


def edit(folder: Path, **keys: Any) -> None:
    saved = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(saved | keys))


def edit_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / TENSORS) | tensors, folder / TENSORS)


@st.composite
def drawn_keys(draw) -> dict[str, Any]:
    """Of PEFT's LoraConfig, for two layers."""
    names = st.lists(st.sampled_from(LORA_TARGETS), min_size=1, max_size=3, unique=True)
    places = [rf"{place}self_attn.{name}" for place in ("", "layers.1.") for name in "qkv"]
    patterns = st.sampled_from(
        [*LORA_TARGETS, r"layers\.1\..*", r"self_attn\.(q|o)_proj", "^layers.0.mlp.up_proj"]
    )
    numbers = st.integers(1, 9)
    expressions = [r".*\.(q|up)_proj", r".*layers\.1\..*_proj", "all-linear"]
    expressions += [[f"{place}_proj" for place in places], "(?i).*Q_PROJ"]
    keys = {
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.sampled_from([1, 8, 17, 2.5])),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(names | st.sampled_from(expressions)),
        # Of two that match PEFT takes another one after saving, which sorts them.
        "rank_pattern": draw(st.dictionaries(patterns, numbers, max_size=1)),
        "alpha_pattern": draw(st.dictionaries(patterns, numbers, max_size=2)),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian", "mica"])),
    }
    if isinstance(keys["target_modules"], list) and draw(st.booleans()):
        layers = st.sampled_from([0, [1], [0, 1]])
        keys |= {"layers_to_transform": draw(layers), "layers_pattern": "layers"}
    if draw(st.booleans()):
        keys["exclude_modules"] = draw(st.sampled_from([["k_proj"], r".*layers\.0.*v_proj"]))
    return keys


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@settings(max_examples=15)
@given(chain=st.lists(st.tuples(st.sampled_from(MADE_ON), drawn_keys()), min_size=1, max_size=2))
@example(chain=[(made_on, PLAIN) for made_on in MADE_ON])
def test_tensors_are_those_of_merge_and_unload(
    decoder: Path, model: LlamaForCausalLM, tmp_path_factory, chain: list[tuple[str, dict]]
):
    folder = tmp_path_factory.getbasetemp() / "chain"
    shutil.rmtree(folder, ignore_errors=True)
    made = [
        (made_on, make(model, folder / str(number), made_on, seed=number, **keys))
        for number, (made_on, keys) in enumerate(chain)
    ]
    assert_merged(decoder, model, made)


@settings(max_examples=30)
@given(data=st.data(), slices=st.sampled_from([1, 2, 3, 7]), dtype=st.sampled_from(["F", "BF16"]))
def test_any_slices_have_the_same_bits(
    decoder: Path, model: LlamaForCausalLM, tmp_path_factory, data, slices: int, dtype: str
):
    """On any number of threads too: ranks share a machine's cores."""
    folder = tmp_path_factory.getbasetemp() / f"sliced-{dtype}"
    if not folder.exists():
        for number in range(2):
            make(model, folder / str(number), seed=number, r=16, target_modules="all-linear")
        base = copy.deepcopy(model).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
        base.save_pretrained(folder / "llm")
    names = [
        f"model.layers.1.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.k_proj")
    ]
    name = f"{data.draw(st.sampled_from(names))}.weight"
    chain = [folder / "0", folder / "1"]
    merged = Merged(TensorFiles(folder / "llm"), chain)
    size = math.prod(merged.shape(name))
    whole = merged.read(name, 0, size)
    assert whole.dtype == torch.float32
    # Products of one to three rows have other last bits than those of more.
    places = st.integers(0, size) | st.integers(1, 3 * merged.shape(name)[1]).map(size.__sub__)
    cuts = sorted(data.draw(places) for _ in range(slices - 1))
    with threads(data.draw(st.sampled_from([1, 2]))):
        pieces = [
            Merged(TensorFiles(folder / "llm"), chain).read(name, start, stop)
            for start, stop in zip([0, *cuts], [*cuts, size])
        ]
    assert torch.equal(torch.cat(pieces), whole)
    # In that order: the other has other last bits.
    turned = Merged(TensorFiles(folder / "llm"), chain[::-1]).read(name, 0, size)
    assert not torch.equal(turned, whole)
    torch.testing.assert_close(turned, whole)


class Counted(TensorFiles):
    """Notes what is read."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.__dict__.setdefault("spans", []).append((start, stop))
        return super().read(name, start, stop)


def test_the_llms_own_bytes_are_read_once(decoder: Path, adapters: Path):
    files = Counted(decoder)
    name = "model.layers.0.mlp.down_proj.weight"
    Merged(files, [adapters, adapters]).read(name, 1000, 50_000)
    ends = [stop for _, stop in files.spans]
    assert files.spans[0][0] == 1000 and ends[-1] == 50_000
    assert [start for start, _ in files.spans[1:]] == ends[:-1]
    untouched = "model.layers.0.mlp.up_proj.weight"
    files.spans.clear()
    Merged(files, [adapters]).read(untouched, 7, 9)
    assert files.spans == [(7, 9)]


@pytest.mark.parametrize(
    "to", ["", "language_model.", "model.language_model.", "language_model.model."]
)
@pytest.mark.parametrize("made_on", ["model.language_model.", "language_model.model."])
def test_places_of_the_layers_in_other_models(
    decoder: Path, model: LlamaForCausalLM, adapters: Path, tmp_path: Path, to: str, made_on: str
):
    """Of a model that sees too: its other tower's linears have other names."""
    expected = merged_by_peft(model, [("LLM", adapters)])
    llm = load_file(decoder / "model.safetensors")
    llm = {f"{to}{name.removeprefix('model.')}": value for name, value in llm.items()}
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    save_file(llm | {tower: torch.ones(160, 160)}, tmp_path / "model.safetensors")
    tensors = load_file(adapters / TENSORS)
    before = "base_model.model."
    tensors = {name.replace(before, before + made_on): value for name, value in tensors.items()}
    save_file(tensors, adapters / TENSORS)
    merged = Merged(TensorFiles(tmp_path), [adapters])
    name = "layers.1.mlp.down_proj.weight"
    value = merged.read(to + name, 0, 160 * 320).view(160, 320)
    torch.testing.assert_close(value, expected[f"model.{name}"], rtol=0, atol=1e-6)
    assert merged.read(tower, 0, 4).tolist() == [1.0] * 4


def test_fused_linears_are_merged_by_the_familys_names(tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    config = Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    phi = Phi3ForCausalLM(config)
    phi.save_pretrained(tmp_path / "phi")
    targets = ["qkv_proj", "gate_up_proj"]
    folder = make(phi, tmp_path / "adapters", "words", target_modules=targets)
    assert_merged(tmp_path / "phi", phi, [("words", folder)])


def test_bin_files_are_adapters_too(decoder: Path, model: LlamaForCausalLM, adapters: Path):
    tensors = load_file(adapters / TENSORS)
    (adapters / TENSORS).unlink()
    torch.save(
        {name: value.half() for name, value in tensors.items()}, adapters / "adapter_model.bin"
    )
    assert_merged(decoder, model, [("LLM", adapters)])


KEYS = {
    "use_dora": True,
    "modules_to_save": ["score", "norm"],
    "lora_bias": True,
    "bias": "all",
    "peft_type": "LOHA",
    "fan_in_fan_out": True,
    "trainable_token_indices": [3],
    "layer_replication": [[0, 2]],
    "target_parameters": ["layers.0.mlp.up_proj.weight"],
    "use_qalora": True,
    "a_key_of_tomorrow": 1.5,
    "r": 0,
    "lora_alpha": "8",
    "target_modules": [],
    "exclude_modules": 5,
    "layers_to_transform": "0",
    "layers_pattern": [1],
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": "8"},
}
INITS = ("pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga")


@pytest.mark.parametrize(
    ("key", "value"), [*KEYS.items(), *(("init_lora_weights", each) for each in INITS)]
)
def test_what_is_not_applied_is_named(decoder: Path, adapters: Path, key: str, value: Any):
    edit(adapters, **{key: value})
    with pytest.raises(ValueError, match=f"{FILE}: {key}=.* is not implemented; ") as error:
        Merged(TensorFiles(decoder), [adapters])
    assert "\n" not in str(error.value) and str(adapters) in str(error.value)


@pytest.mark.parametrize("key", ["rank_pattern", "exclude_modules", "target_modules"])
def test_an_expression_that_is_none_is_named(decoder: Path, adapters: Path, key: str):
    edit(adapters, **{key: {"(": 2} if key == "rank_pattern" else "("})
    with pytest.raises(ValueError, match=f"{FILE}: {key} has no expression"):
        Merged(TensorFiles(decoder), [adapters])


Q = "base_model.model.layers.0.self_attn.q_proj"
STRAY = [
    "base_model.model.lm_head.lora_A.weight",
    "base_model.model.embed_tokens.lora_embedding_A",
    "base_model.model.score.lora_A.weight",
    "base_model.model.norm.weight",
    "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    f"{Q}.lora_magnitude_vector",
    f"{Q}.lora_A.default.weight",  # which PEFT leaves unread
    f"{Q}.bias",
    "layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.layers.0.self_attn.v_proj.lora_A.weight",  # its configuration has no v_proj
]


@pytest.mark.parametrize("name", STRAY)
def test_a_tensor_that_is_added_to_nothing_is_named(decoder: Path, adapters: Path, name: str):
    edit_tensors(adapters, **{name: torch.ones(4, 160)})
    message = rf"{TENSORS}: nothing reads its tensor {re.escape(name)}; .*merge_and_unload"
    with pytest.raises(ValueError, match=message):
        Merged(TensorFiles(decoder), [adapters])


def test_what_the_llm_has_no_place_for_is_named(
    decoder: Path, model: LlamaForCausalLM, tmp_path: Path
):
    larger = build_decoder(tmp_path / "larger", width=160, layers=3)
    wider = build_decoder(tmp_path / "wider", width=192, layers=2)
    for place, message in ((larger, "has no model.layers.2"), (wider, r"\(4, 384\).*\(4, 320\)")):
        other = LlamaForCausalLM.from_pretrained(place)
        folder = make(other, tmp_path / f"of_{place.name}")
        with pytest.raises(ValueError, match=message) as error:
            Merged(TensorFiles(decoder), [folder])
        assert str(folder) in str(error.value) and str(decoder) in str(error.value)
    # Of this LLM, but of another rank than it says, by half, or twice.
    folder = make(model, tmp_path / "own")
    edit(folder, r=5)
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(4, 320\); \(5, 320\) fits"):
        Merged(TensorFiles(decoder), [folder])
    tensors = load_file(folder / TENSORS)
    edit(folder, r=4)
    half = {name: value for name, value in tensors.items() if name != f"{Q}.lora_B.weight"}
    save_file(half, folder / TENSORS)
    with pytest.raises(ValueError, match=f"has no tensor {Q}.lora_B.weight"):
        Merged(TensorFiles(decoder), [folder])
    twice = f"{Q}.lora_A.weight".replace("layers", "model.layers")
    save_file(tensors | {twice: torch.ones(4, 160)}, folder / TENSORS)
    with pytest.raises(ValueError, match="which are one"):
        Merged(TensorFiles(decoder), [folder])


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_behind_the_llm_is_left_out(
    decoder: Path, model: LlamaForCausalLM, tmp_path: Path, task_type: str
):
    """PEFT saves one with whatever was trained for such a task."""
    around = AROUND[task_type](model.config)
    around.model = copy.deepcopy(model.model)
    folder = make_adapters(around, tmp_path / "tuned", **PLAIN, task_type=task_type)
    assert "base_model.model.score.weight" in load_file(folder / TENSORS)
    assert_merged(decoder, model, [("labels", folder)])


LAST = "base_model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("matrices", ["AB", "A"])
def test_a_linear_that_lacks_its_adapters_is_named(
    decoder: Path, model: LlamaForCausalLM, tmp_path: Path, matrices: str
):
    """One that its configuration says has some; of layers that it leaves out none are asked for."""
    folder = make(model, tmp_path / "cut")
    gone = {f"{LAST}.lora_{matrix}.weight" for matrix in matrices}
    tensors = load_file(folder / TENSORS)
    save_file({name: tensors[name] for name in tensors if name not in gone}, folder / TENSORS)
    message = "no adapters of layers.1.self_attn.q_proj; .*another LLM's"
    with pytest.raises(ValueError, match=message if len(gone) == 2 else "has no tensor"):
        Merged(TensorFiles(decoder), [folder])
    if len(gone) == 2:
        edit(folder, exclude_modules=["layers.1.self_attn.q_proj"])
        Merged(TensorFiles(decoder), [folder])


def test_adapters_that_add_nothing_are_named(decoder: Path, adapters: Path):
    save_file({}, adapters / TENSORS)
    with pytest.raises(ValueError, match=f"^{adapters} has no adapters of a linear .* leave it"):
        Merged(TensorFiles(decoder), [adapters])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_named(decoder: Path, adapters: Path, value: float):
    b_FR = load_file(adapters / TENSORS)[f"{Q}.lora_B.weight"]
    b_FR[3, 1] = value
    edit_tensors(adapters, **{f"{Q}.lora_B.weight": b_FR})
    merged = Merged(TensorFiles(decoder), [adapters])
    message = f"{adapters}: {Q}.lora_B.weight has values that are NaN or infinite"
    with pytest.raises(ValueError, match=re.escape(message)):
        merged.read("model.layers.0.self_attn.q_proj.weight", 0, 160 * 160)


def test_a_chain_is_known_by_its_content(model: LlamaForCausalLM, adapters: Path, tmp_path: Path):
    one, copied = str(adapters), str(shutil.copytree(adapters, tmp_path / "copied"))
    other = str(make(model, tmp_path / "other", seed=1))
    known = chain_fingerprint([one, other])
    assert chain_fingerprint([]) == ""
    assert chain_fingerprint([copied, other]) == known
    edit(Path(copied), base_model_name_or_path="elsewhere", lora_dropout=0.5)
    assert chain_fingerprint([copied, other]) == known
    assert len({known, *map(chain_fingerprint, ([other, one], [one], [other], [one, one]))}) == 5
    edit(Path(copied), lora_alpha=7)
    assert chain_fingerprint([copied, other]) != known


def test_adapters_that_are_not_there_are_named(decoder: Path, adapters: Path, tmp_path: Path):
    model = {"decoder": str(decoder), "adapters": [str(adapters), str(tmp_path / "gone")]}
    config = build_config(tmp_path, model=model)
    with pytest.raises(ValueError, match="^model.adapters: .*/gone is neither a folder nor"):
        open_decoder(config.model)
    run = tmp_path / "run"
    (run / "checkpoints" / "latest").mkdir(parents=True)
    for name, fix in (
        (run, "it is a run: name one of its checkpoints, .*/run/checkpoints/latest"),
        (decoder, "it is a model: name it as model.decoder, or name a folder"),
        ("", "name a folder, or a hub id, of PEFT's adapters"),
    ):
        message = f"^model.adapters: '{name}' has no {FILE}; {fix}"
        with pytest.raises(ValueError, match=message) as error:
            find_adapters(str(name))
        assert "\n" not in str(error.value)
    (adapters / TENSORS).unlink()
    with pytest.raises(ValueError, match=f"has no {TENSORS}"):
        Merged(TensorFiles(decoder), [adapters])
