"""Adapters that PEFT made: our states are PEFT's, or the key or tensor that we do not apply is
named.
"""

import copy
import dataclasses
import json
import re
import shutil
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
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from mtllm_engine.config import LORA_TARGETS, Config, LoraConfig
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.model.build import build_stack
from mtllm_engine.model.peft import peft_config, read_chain, read_heads, read_lora
from mtllm_engine.training.engine import shard
from tests.support.adapters import make_adapters
from tests.support.padded import assert_close, attention_mask, load_llm
from tests.support.tiny import build_config, build_decoder, build_encoder, build_world

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = build_world()
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
FILE, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Config:
    """A configuration over a tiny encoder and a Llama with biases."""
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder", width=16, layers=1)
    build_decoder(folder / "decoder", width=32, layers=2, attention_bias=True, mlp_bias=True)
    return build_config(folder, zero={"stage": 0})


@pytest.fixture(scope="module")
def llm(models: Config) -> LlamaModel:
    return load_llm(models).eval()


def make(llm: LlamaModel, folder: Path, **keys) -> None:
    """PEFT's adapters of random values in a folder."""
    make_adapters(copy.deepcopy(llm), folder, **keys)


def edit(folder: Path, **keys) -> None:
    saved = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(saved | keys))


IDS_T = np.random.default_rng(0).integers(2, 400, 17, dtype=np.int32)


def our_states(models: Config, adapters: Path, role: str) -> torch.Tensor:
    """Of the LLM with these adapters, as `teacher` or as what training or evaluation starts from
    ("init_from"); normed by nobody.
    """
    given = {"teacher": str(adapters), "init_from": (str(adapters),)}
    model = replace(models.model, **{role: given[role]})
    config = replace(models, model=model)
    if role == "init_from":  # as evaluation reads the fine-tuned LLM
        objective = replace(models.objective, kind="finetune", reader="llm")
        config = replace(config, objective=objective, lora=read_lora(adapters))
    stack, weights = build_stack(config, learns=False)
    decoder = shard(stack, weights, config, ALONE).eval().decoder
    document = Document(key="0", seed=0, student_ids_S=IDS_T, teacher_ids_T=IDS_T)
    tokens = collate([document], step_seed=0, device=ALONE.device).teacher
    name = "teacher" if role == "teacher" else "student"
    with torch.no_grad():
        stream = decoder.stream(tokens, adapters=name, grad=False)
        return decoder((decoder.embedding(tokens.ids_S),), (stream,))[0]


def assert_same_states(models: Config, llm: LlamaModel, adapters: Path, ours_TD: torch.Tensor):
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llm), adapters).eval()
    ids_BL = torch.from_numpy(IDS_T).long()[None]
    mask = attention_mask(torch.ones_like(ids_BL).bool(), causal=False)
    with torch.no_grad():
        theirs_BLD = theirs(input_ids=ids_BL, attention_mask=mask, use_cache=False)
        assert_close(llm.norm(ours_TD), theirs_BLD.last_hidden_state[0])


NAMES = st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True)
OTHER_TARGETS = ["all-linear", None, r".*\.(q|v)_proj", r"layers\.0.*_proj", ["embed_tokens"]]
OTHER_TARGETS += [["self_attn.q_proj"], ["layers.1.mlp.up_proj"], ["q_proj", "embed_tokens"], []]
INITS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "loftq", "eva"]
INITS += ["corda", "lora_ga", "mica"]
KEYS = {  # of PEFT's LoraConfig: values that it or its file may have
    "task_type": [None, "FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_CLS"],
    "peft_type": ["LORA", "ADALORA", "LOHA"],
    "auto_mapping": [None, {"base_model_class": "LlamaModel", "parent_library": "x"}],
    "peft_version": [None, "0.1.0"],
    "base_model_name_or_path": ["", None, "meta-llama/Llama-3.1-8B"],
    "revision": [None, "main"],
    "inference_mode": [False, True],
    "r": [1, 2, 8],
    "target_modules": OTHER_TARGETS,
    "exclude_modules": [None, [], "", ["k_proj"], ["layers.1.self_attn.q_proj"], ".*q_proj"],
    "lora_alpha": [1, 8, 17, 2.5, 0],
    "lora_dropout": [0.0, 0.1, 0.9],
    "fan_in_fan_out": [False, True],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [False, True],
    "modules_to_save": [None, [], ["score"], ["norm"], ["score", "embed_tokens"], ["q_proj"]],
    "init_lora_weights": INITS,
    "layers_to_transform": [None, [], 0, 1, [0], [0, 1]],
    "layers_pattern": [None, "layers"],
    "rank_pattern": [{}, {"q_proj": 2}, {r"layers\.0.*": 3}],
    "alpha_pattern": [{}, {"q_proj": 2}, {r"layers\.0.*": 3}],
    "megatron_config": [None, {"params_dtype": "float32"}],
    "megatron_core": ["megatron.core", "another.core"],
    "trainable_token_indices": [None, [3, 5], {"embed_tokens": [3]}],
    "loftq_config": [{}, {"loftq_bits": 4, "loftq_iter": 1}],
    "eva_config": [None, {"rho": 2.0}],
    "corda_config": [None, {"corda_method": "ipm"}],
    "lora_ga_config": [None, {"direction": "ArB2r"}],
    "use_dora": [False, True],
    "velora_config": [None, {"num_groups": 4}],
    "alora_invocation_tokens": [None, [3, 5]],
    "use_qalora": [False, True],
    "qalora_group_size": [16, 8],
    "monteclora_config": [None, {"num_samples": 2}],
    "layer_replication": [None, [[0, 2], [1, 2]]],
    "runtime_config": [None, {"ephemeral_gpu_offload": True}],
    "lora_bias": [False, True],
    "target_parameters": [None, [], ["layers.0.mlp.up_proj.weight"]],
    "use_bdlora": [None, {"nblocks": 2}],
    "arrow_config": [None, {"top_k": 2}],
    "kasa_config": [None, {"beta": 1e-4}],
    "ensure_weight_tying": [False, True],
    "a_key_of_tomorrow": [None, False, 0, "", [], 1.5, "yes"],
}
HARMLESS = {"modules_to_save": [["score"]]}
HARMLESS |= {"init_lora_weights": [True, "gaussian", "orthogonal", "eva", "mica"]}
FREE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
FREE |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "qalora_group_size"}
FREE |= {"eva_config"}


def test_every_key_of_peft_is_tried():
    assert {item.name for item in dataclasses.fields(peft.LoraConfig)} <= KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_asks_for_something_is_named(llm: LlamaModel, tmp_path: Path, key: str):
    make(llm, tmp_path, **PLAIN)  # of which a pattern means some alone
    usual = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    harmless = [usual.get(key), None, False, [], {}, "", *HARMLESS.get(key, [])]
    for value in KEYS[key]:
        (tmp_path / FILE).write_text(json.dumps({"peft_type": "LORA"} | PLAIN | {key: value}))
        is_harmless = any(type(value) is type(each) and value == each for each in harmless)
        if key != "target_modules" and (key in FREE or is_harmless):
            read_lora(tmp_path)
        else:
            with pytest.raises(ValueError, match=f"{FILE}: {key}=.* is not implemented"):
                read_lora(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"r": 4, "lora_alpha": 8}', "has no target_modules"),
        ('{"lora_alpha": 8, "target_modules": ["q_proj"]}', "has no r"),
        ('{"r": true, "lora_alpha": 8, "target_modules": ["q_proj"]}', "r=true is not"),
        ('{"r": 0, "lora_alpha": 8, "target_modules": ["q_proj"]}', "r=0 is not"),
        ('{"r": 4, "lora_alpha": NaN, "target_modules": ["q_proj"]}', "lora_alpha=NaN is not"),
        ('{"r": 4, "lora_alpha": 8, "target_modules": [["q_proj"]]}', "target_modules=.* is not"),
        (
            '{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": 1}',
            "use_rslora=1 is not",
        ),
    ],
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, content: str, message: str):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / FILE) in str(error.value)


@pytest.mark.parametrize("role", ["teacher", "init_from"])
@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model.layers.0.self_attn.v_proj.lora_A.weight",
        "base_model.model.norm.weight",
        "weight",  # a projection's, in the adapters' file
        "head.weight",
    ],
)
def test_a_tensor_that_nothing_reads_is_named(
    models: Config, llm: LlamaModel, tmp_path: Path, role: str, name: str
):
    make(llm, tmp_path, **PLAIN)
    tensors = load_file(tmp_path / TENSORS)
    save_file(tensors | {name: torch.ones(4, 32)}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=f"{TENSORS}: nothing reads its tensor {name};"):
        our_states(models, tmp_path, role)


def test_adapters_without_their_configuration_are_no_start(
    models: Config, llm: LlamaModel, tmp_path: Path
):
    make(llm, tmp_path, **PLAIN)
    (tmp_path / FILE).unlink()
    model = replace(models.model, init_from=(str(tmp_path),))
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        build_stack(replace(models, model=model))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("extra", ["", "norm.weight"])
def test_a_projection_is_read_whole_or_not_at_all(
    models: Config, llm: LlamaModel, tmp_path: Path, bias: bool, extra: str
):
    """A stack reads it; the LLM alone leaves it out, and only what it knows."""
    make(llm, tmp_path, **PLAIN)
    tensors = {"weight": torch.ones(32, 16), "bias": torch.ones(32)}
    tensors |= {extra: torch.ones(3)} if extra else {}
    save_file(tensors, tmp_path / "projection.safetensors")
    model = replace(models.model, init_from=(str(tmp_path),), projection_bias=bias)
    config = replace(models, model=model, lora=read_lora(tmp_path))
    unread = "" if bias else "bias"
    if extra:
        unread = f"({extra}|bias)"
    if unread:
        message = f"projection.safetensors: nothing reads its tensor {unread};"
        with pytest.raises(ValueError, match=message):
            build_stack(config)
    else:
        assert "projection.bias" in build_stack(config)[1].sources
    if extra:
        with pytest.raises(ValueError, match=f"nothing reads its tensor {extra};"):
            our_states(models, tmp_path, "init_from")
    else:
        our_states(models, tmp_path, "init_from")


def test_a_tensor_in_two_files_is_named(models: Config, llm: LlamaModel, tmp_path: Path):
    make(llm, tmp_path, **PLAIN)
    weight = {"weight": torch.ones(32, 16)}
    save_file(load_file(tmp_path / TENSORS) | weight, tmp_path / TENSORS)
    save_file(weight | {"bias": torch.ones(32)}, tmp_path / "projection.safetensors")
    with pytest.raises(ValueError, match=f"projection.*has the tensor weight, .*/{TENSORS}"):
        our_states(models, tmp_path, "init_from")


@st.composite
def configs(draw) -> dict[str, Any]:
    """Targets by plain names, a rank and a factor, and one to three keys of any value."""
    keys = PLAIN | {"target_modules": draw(NAMES)}
    chosen = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=3, unique=True))
    return keys | {key: draw(st.sampled_from(KEYS[key])) for key in chosen}


def save(llm: LlamaModel, folder: Path, keys: dict[str, Any]) -> set[str]:
    """Adapters by PEFT, or, where it cannot make such ones here, plain ones that say they are;
    returns the keys that ask for something that is not plain.
    """
    names = keys["target_modules"]
    is_plain = isinstance(names, list) and names and set(names) <= set(LORA_TARGETS)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(llm, folder, **keys)
    except Exception:  # no such key, a package that is not there, values that do not go together
        plain = PLAIN | {"r": keys["r"]} | ({"target_modules": names} if is_plain else {})
        make(llm, folder, **plain)
        edit(folder, **keys)
    saved = json.loads((folder / FILE).read_text())
    names = saved["target_modules"]
    is_plain = isinstance(names, list) and names and set(names) <= set(LORA_TARGETS)
    free = FREE | ({"target_modules"} if is_plain else set())
    usual = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    return {key for key, value in saved.items() if key not in free and value != usual.get(key)}


@settings(max_examples=60)
@given(keys=configs(), role=st.sampled_from(["teacher", "init_from"]))
@example(keys=PLAIN | {"use_rslora": True}, role="init_from")
@example(keys=PLAIN | {"layers_to_transform": 0}, role="teacher")
def test_states_are_pefts_or_the_key_is_named(
    models: Config, llm: LlamaModel, tmp_path_factory, keys: dict[str, Any], role: str
):
    folder = tmp_path_factory.getbasetemp() / "drawn"
    asking = save(llm, folder, keys)
    try:
        ours_TD = our_states(models, folder, role)
    except ValueError as error:
        assert asking and any(f"{FILE}: {key}=" in str(error) for key in asking), str(error)
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert_same_states(models, llm, folder, ours_TD)


@pytest.mark.parametrize("role", ["teacher", "init_from"])
def test_adapters_of_a_causal_lm_are_those_of_its_llm(
    models: Config, llm: LlamaModel, tmp_path: Path, role: str
):
    """What most people have: names that begin one module further out."""
    make(llm, tmp_path / "inner", **PLAIN)
    causal = LlamaForCausalLM.from_pretrained(models.model.decoder)
    make(causal, tmp_path / "outer", **PLAIN)
    tensors = load_file(tmp_path / "outer" / TENSORS)
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    inner, outer = (our_states(models, tmp_path / each, role) for each in ("inner", "outer"))
    assert torch.equal(inner, outer)
    assert_same_states(models, causal.model, tmp_path / "inner", outer)
    # Both names of one tensor.
    one = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(
        tensors | {one: tensors[one.replace("layers", "model.layers", 1)].clone()},
        tmp_path / "outer" / TENSORS,
    )
    with pytest.raises(ValueError, match=f"has the tensor {re.escape(one)}, and so has"):
        our_states(models, tmp_path / "outer", role)


@pytest.mark.parametrize("role", ["teacher", "init_from"])
def test_a_head_behind_the_llm_is_left_out(
    models: Config, llm: LlamaModel, tmp_path: Path, role: str
):
    labels = LlamaForSequenceClassification.from_pretrained(models.model.decoder)
    make(labels, tmp_path / "adapters", **PLAIN, task_type="SEQ_CLS")
    tensors = load_file(tmp_path / "adapters" / TENSORS)
    saved = json.loads((tmp_path / "adapters" / FILE).read_text())
    assert "base_model.model.score.weight" in tensors and "score" in saved["modules_to_save"]
    assert read_heads(tmp_path / "adapters") == ["score"]
    ours_TD = our_states(models, tmp_path / "adapters", role)
    adapted = peft.PeftModel.from_pretrained(labels, tmp_path / "adapters").merge_and_unload()
    bare = peft.LoraConfig(**PLAIN, init_lora_weights=True)  # which adds nothing
    peft.get_peft_model(copy.deepcopy(llm), bare).save_pretrained(tmp_path / "nothing")
    assert_same_states(models, adapted.model.eval(), tmp_path / "nothing", ours_TD)


@pytest.mark.parametrize("role", ["teacher", "init_from"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_mean_all_linears_alike_are_applied(
    models: Config, llm: LlamaModel, tmp_path: Path, role: str, key: str
):
    """And those that mean none, as PEFT leaves them there; others are refused."""
    make(llm, tmp_path, **PLAIN | {key: {"(q|down)_proj": 3, "v_proj": 9}})
    assert_same_states(models, llm, tmp_path, our_states(models, tmp_path, role))
    make(llm, tmp_path, **PLAIN | {key: {r"layers\.0\..*": 3}})
    with pytest.raises(ValueError, match=f"{FILE}: {key}=.* every linear the same, or name these"):
        our_states(models, tmp_path, role)


CHAINS = st.lists(st.text(min_size=1), max_size=3)


def test_a_stack_begins_with_adapters_that_have_no_projection(
    models: Config, llm: LlamaModel, tmp_path: Path
):
    """Such as LLM2Vec's: that is drawn as without them. Who only reads needs one."""
    make(llm, tmp_path, **PLAIN)
    model = replace(models.model, init_from=(str(tmp_path),))
    config = replace(models, model=model, lora=read_lora(tmp_path))
    _, weights = build_stack(config)
    _, fresh = build_stack(models)
    for name in ("projection.weight", "projection.bias"):
        size = weights.shapes[name].numel()
        assert torch.equal(weights.read(name, 0, size), fresh.read(name, 0, size))
    name = "decoder.layers.0.down.student.down_proj.lora_A"
    saved = load_file(tmp_path / TENSORS)["base_model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert torch.equal(weights.read(name, 0, saved.numel()), saved.flatten())
    with pytest.raises(ValueError, match=f"{tmp_path} has no projection.safetensors; it takes"):
        build_stack(config, learns=False)


@pytest.mark.parametrize("place", ["model.language_model.", "language_model.model."])
def test_adapters_of_a_model_that_sees_are_those_of_its_llm(
    models: Config, llm: LlamaModel, tmp_path: Path, place: str
):
    make(llm, tmp_path, **PLAIN)
    expected = our_states(models, tmp_path, "teacher")
    tensors = load_file(tmp_path / TENSORS)
    own = "base_model.model."
    save_file(
        {name.replace(own, own + place): tensors[name] for name in tensors}, tmp_path / TENSORS
    )
    assert torch.equal(our_states(models, tmp_path, "teacher"), expected)


@given(names=NAMES, causal=st.booleans(), chain=CHAINS)
@example(names=["q_proj"], causal=True, chain=["a) then b", ", after merging ", "x/y (1)", "%29"])
def test_what_is_written_is_read(
    tmp_path_factory, names: list[str], causal: bool, chain: list[str]
):
    lora = LoraConfig(rank=4, alpha=6.0, rslora=True, target_modules=tuple(names))
    path = tmp_path_factory.getbasetemp() / FILE
    saved = peft_config(lora, "", causal=causal, chain=chain)
    path.write_text(json.dumps(saved))
    assert read_lora(path.parent) == lora and read_chain(path.parent) == tuple(chain)
    expression = saved["target_modules"]
    linears = [f"layers.1.self_attn.{name}" for name in LORA_TARGETS]
    meant = [name for name in linears if re.fullmatch(expression, name)]
    assert {name.rpartition(".")[2] for name in meant} == set(names)
    # An expression that is not just ours is not taken for it.
    path.write_text(json.dumps(saved | {"target_modules": saved["target_modules"] + "?"}))
    with pytest.raises(ValueError, match="target_modules=.* is not implemented"):
        read_lora(path.parent)


@pytest.mark.parametrize("causal", [True, False])
def test_our_adapters_open_on_the_llm_and_fail_by_name_on_what_is_around_it(
    models: Config, llm: LlamaModel, tmp_path: Path, causal: bool
):
    """PEFT itself would find no tensor for LlamaForCausalLM's linears, and leave them bare."""
    make(llm, tmp_path, **PLAIN)
    listed = our_states(models, tmp_path, "init_from")
    lora = read_lora(tmp_path)
    chain = ["someone/mntp", "its (second)"]
    edit(tmp_path, **peft_config(lora, models.model.decoder, causal=causal, chain=chain))
    ours = our_states(models, tmp_path, "init_from")
    assert torch.equal(ours, listed)
    assert_same_states(models, llm, tmp_path, ours)
    outer = LlamaForCausalLM.from_pretrained(models.model.decoder)
    where = "on AutoModel" if causal else "on AutoModel with is_causal=False"
    where += ", after merging someone/mntp then its%20%28second%29)"
    with pytest.raises(ValueError, match=re.escape(where)):
        peft.PeftModel.from_pretrained(outer, tmp_path)
