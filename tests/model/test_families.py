"""Every family of LLMs against transformers' own classes and PEFT, through the loading path:
states, gradients, what a configuration says, and the sizes of published models.
"""

import copy
import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    M2M100Model,
    PreTrainedConfig,
)

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Batch, Document, Totals, collate
from mtllm_engine.model import families
from mtllm_engine.model.build import build_stack
from mtllm_engine.model.families import decoder_spec
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.weights import Weights
from tests.support.families import (
    FAMILIES,
    LONGEST,
    MIXED,
    Doubled,
    build_llm,
    linears_of,
    load_text_model,
    randomise_weights,
    small_config,
    write_headers,
    write_llm,
)
from tests.support.padded import TOLERANCE, build, mean_pool, pad, randomise, trained
from tests.support.tiny import build_config, build_encoder, build_world

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = build_world()
Results = dict[str, torch.Tensor]

# `make prove` runs this file under a profile that draws many more.
IS_LONG = settings.get_current_profile_name() == "long"
DRAWN = settings(max_examples=60 if IS_LONG else 2, phases=[Phase.generate])
LENGTHS = st.one_of(st.integers(1, LONGEST), st.sampled_from([1, LONGEST]))
SIZES = st.lists(st.tuples(LENGTHS, LENGTHS), max_size=2)  # of student and teacher
ALWAYS = [(1, LONGEST), (LONGEST, 1), (9, 30)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("models") / "encoder", width=16, layers=1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same weights twice: in our stack, and in transformers and PEFT."""

    stack: Stack
    encoder: nn.Module
    linear: nn.Linear  # the projection's
    llm: peft.PeftModel

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Their parameters by our names."""
        theirs = dict(self.llm.named_parameters())
        theirs |= {f"projection.{name}": each for name, each in self.linear.named_parameters()}
        names = {name: their_name(name, list(theirs)) for name in trained(self.stack)}
        assert len(set(names.values())) == len(names)
        assert all(each in names.values() for each in theirs if ".lora_" in each)
        return {name: theirs[other] for name, other in names.items()}


def their_name(name: str, known: Sequence[str]) -> str:
    """Of ours, such as `decoder.layers.0.qkv.student.q_proj.lora_A`: the linear's own name, in the
    same layer."""
    parts = re.fullmatch(r"decoder\.layers\.(\d+)\.\w+\.student\.(\w+)\.(lora_[AB])", name)
    if parts is None:
        return name
    layer, linear, matrix = parts.groups()
    end = re.compile(rf"\.layers\.{layer}\.\w+\.{linear}\.{matrix}\.default\.weight$")
    (found,) = (other for other in known if end.search(other))
    return found


def configure(folder: Path, encoder: Path, **sections) -> Config:
    model = {"encoder": str(encoder)} | sections.pop("model", {})
    return build_config(folder, model=model, zero={"stage": 0}, **sections)


def build_pair(folder: Path, encoder: Path, *, causal: bool) -> Pair:
    """Both sides of `decoder` in a folder, with the same random adapters and projection."""
    text = load_text_model(folder / "decoder")
    text.config.is_causal = causal
    # The one that takes a soft cap everywhere.
    model = {"causal": causal, "attention": "reference" if has_cap(text.config) else "auto"}
    config = configure(folder, encoder, model=model, lora={"dropout": 0.0})
    adapters = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=list(linears_of(text.config)),
    )
    stack = randomise(build(config))
    width, encoder_width = stack.projection.weight.shape
    pair = Pair(
        stack=stack,
        encoder=M2M100Model.from_pretrained(encoder, attn_implementation="eager").encoder,
        linear=nn.Linear(encoder_width, width),
        llm=peft.get_peft_model(text, adapters).eval(),
    )
    with torch.no_grad():
        for name, parameter in pair.trained.items():
            parameter.copy_(stack.get_parameter(name))
    return pair


def has_cap(text: PreTrainedConfig) -> bool:
    return text.model_type == "gemma2" and bool(text.attn_logit_softcapping)


def documents_of(sizes: Sequence[tuple[int, int]], pair: Pair) -> list[Document]:
    """Documents of random tokens, none of them padding."""
    generator = np.random.default_rng(len(sizes))
    sides = (pair.stack.encoder, pair.stack.decoder)
    documents = []
    for number, lengths in enumerate(sizes):
        student, teacher = (
            generator.integers(2, side.embedding.num_embeddings, length, dtype=np.int32)
            for side, length in zip(sides, lengths)
        )
        ids = {"student_ids_S": student, "teacher_ids_T": teacher}
        documents.append(Document(key=str(number), seed=0, **ids))
    return documents


def pack(documents: Sequence[Document]) -> Batch:
    return collate(documents, step_seed=0, device=ALONE.device)


def our_results(pair: Pair, documents: Sequence[Document]) -> Results:
    """States before the LLM's last norm, normed by theirs; then what our own norm is part of."""
    stack, batch = pair.stack, pack(documents)
    counts = Totals(documents=len(documents), spans=len(documents))
    results = {}
    with torch.no_grad():
        for name, side, adapters in (
            ("the LLM's states", "teacher", None),
            ("the student's states", "student", "student"),
            ("the adapted LLM's states", "teacher", "student"),
        ):
            states_SD = stack.read(batch, side=side, adapters=adapters)
            results[name] = pair.llm.get_base_model().norm(states_SD)
        pooled_PD = stack.objective.pool(states_SD, batch.teacher_spans)
        results["pooled"] = pooled_PD
    loss = stack(batch, counts).loss
    gradients = torch.autograd.grad(loss, list(trained(stack).values()))
    return results | {"loss": loss.detach()} | dict(zip(trained(stack), gradients, strict=True))


def their_results(pair: Pair, documents: Sequence[Document]) -> Results:
    """The method as one would write it with transformers and PEFT."""
    ids_BL, real_BL = pad([document.student_ids_S for document in documents])
    with torch.no_grad():
        encoded_BLE = pair.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state
    student_BLD = states(pair, real_BL, inputs_embeds=pair.linear(encoded_BLE))
    teacher_ids_BL, teacher_real_BL = pad([document.teacher_ids_T for document in documents])
    with torch.no_grad():
        adapted_BLD = states(pair, teacher_real_BL, input_ids=teacher_ids_BL)
        with pair.llm.disable_adapter():
            bare_BLD = states(pair, teacher_real_BL, input_ids=teacher_ids_BL)
    differences_PD = mean_pool(student_BLD, real_BL) - mean_pool(bare_BLD, teacher_real_BL)
    loss = differences_PD.square().mean()
    gradients = torch.autograd.grad(loss, list(pair.trained.values()))
    return {
        "the LLM's states": bare_BLD[teacher_real_BL],
        "the student's states": student_BLD.detach()[real_BL],
        "the adapted LLM's states": adapted_BLD[teacher_real_BL],
        "pooled": mean_pool(adapted_BLD, teacher_real_BL),
        "loss": loss.detach(),
        **dict(zip(pair.trained, gradients, strict=True)),
    }


def states(pair: Pair, real_BL: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    return pair.llm(**inputs, attention_mask=real_BL.long(), use_cache=False).last_hidden_state


def exact_results(pair: Pair, documents: Sequence[Document]) -> Results:
    """Theirs, computed in fp64."""
    parts = {"encoder": pair.encoder, "linear": pair.linear, "llm": pair.llm}
    doubled = {name: copy.deepcopy(part).double() for name, part in parts.items()}
    with Doubled():
        return their_results(Pair(stack=pair.stack, **doubled), documents)


def rounded_results(pair: Pair, documents: Sequence[Document]) -> list[Results]:
    """Theirs, a few times, each with all weights off by about a rounding of fp32."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(8):
        parts = {name: copy.deepcopy(getattr(pair, name)) for name in ("encoder", "linear", "llm")}
        with torch.no_grad():
            for parameter in (each for part in parts.values() for each in part.parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 2.0**-24 * noise)
        results.append(their_results(Pair(stack=pair.stack, **parts), documents))
    return results


def assert_same(pair: Pair, documents: Sequence[Document]) -> None:
    """To 1e-5 of the largest value; where a model makes more than that of its own roundings, to
    five times what they come to in transformers, against fp64."""
    ours, theirs = our_results(pair, documents), their_results(pair, documents)
    exact: Results = {}
    rounded: list[Results] = []
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        allowed = TOLERANCE * largest_near(name, theirs)
        assert allowed > 0, name
        if (ours[name] - expected).abs().max() > allowed:
            exact = exact or exact_results(pair, documents)
            error = (ours[name] - exact[name]).abs().max().item()
            if error > allowed:
                rounded = rounded or [theirs, *rounded_results(pair, documents)]
                errors = [(each[name] - exact[name]).abs().max().item() for each in rounded]
                most = 5 * statistics.mean(each**2 for each in errors) ** 0.5
                assert error <= most, f"{name}: {error}, {allowed} is allowed, {errors} are theirs"


def largest_near(name: str, results: Results) -> float:
    """Of the tensor itself; of q's and k's gradients, which are small differences of large numbers,
    of their whole layer."""
    layer = name[: name.index("qkv.")] if re.search(r"\.[qk]_proj\.", name) else name
    near = [each for other, each in results.items() if other.startswith(layer)]
    return max(each.abs().max().item() for each in near)


@pytest.mark.parametrize("family", FAMILIES)
@DRAWN
@given(data=st.data())
def test_states_and_gradients_are_those_of_transformers_and_peft(
    encoder: Path, tmp_path_factory, family: str, data: st.DataObject
):
    folder = tmp_path_factory.mktemp(family)
    config = data.draw(FAMILIES[family])
    write_llm(folder / "decoder", config, seed=data.draw(st.integers(0, 99)))
    sizes = [*ALWAYS, *data.draw(SIZES)]
    for causal in (False, True):
        pair = build_pair(folder, encoder, causal=causal)
        assert_same(pair, documents_of(sizes, pair))


def test_a_soft_cap_is_refused_where_attention_has_none(encoder: Path, tmp_path: Path):
    config = small_config("gemma2", attn_logit_softcapping=50.0)
    write_llm(tmp_path / "decoder", config)
    with pytest.raises(ValueError, match="cap"):
        build_stack(configure(tmp_path, encoder, model={"attention": "torch"}))
    stack, _ = build_stack(configure(tmp_path, encoder))
    assert stack.attention.label("cpu") == "reference"
    assert stack.encoder.layers[0].attention.label("cpu") == "torch SDPA"


WRONG = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}
WRONG |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rope_parameters": WRONG}, "rope_parameters do not hold"), ({"layers": 0}, "no layers")],
)
def test_what_a_configuration_cannot_mean_is_said(changes: dict, message: str):
    config = small_config("llama", head_dim=8)
    config.rope_parameters = changes.get("rope_parameters", config.rope_parameters)
    config.num_hidden_layers = changes.get("layers", config.num_hidden_layers)
    with pytest.raises(ValueError, match=message):
        decoder_spec(config)


def test_a_wrapper_with_its_table_under_the_heads_name(encoder: Path, tmp_path: Path):
    build_llm(tmp_path / "decoder", "gemma3")
    before = read_all(build_stack(configure(tmp_path, encoder))[1])
    path = tmp_path / "decoder" / "model.safetensors"
    tensors = load_file(path)
    (table,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors["lm_head.weight"] = tensors.pop(table)
    save_file(tensors, path, {"format": "pt"})
    for name, value in read_all(build_stack(configure(tmp_path, encoder))[1]).items():
        assert torch.equal(value, before[name]), name


def read_all(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: weights.read(name, 0, shape.numel()) for name, shape in weights.shapes.items()}


PUBLISHED = json.loads((Path(__file__).parent / "families.json").read_text())


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda each: each["model"].split("/")[-1])
def test_published_models_have_their_published_size(
    encoder: Path, tmp_path: Path, published: dict[str, Any]
):
    """Every tensor by its name and shape, through the loading path; nothing is read."""
    folder = tmp_path / "decoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published["config"]))
    config = AutoConfig.from_pretrained(folder)
    theirs = write_headers(folder, config)
    attention = "reference" if has_cap(config.get_text_config()) else "auto"
    stack, weights = build_stack(configure(tmp_path, encoder, model={"attention": attention}))
    ours = {name: each for name, each in stack.named_parameters() if is_frozen_llm(name)}
    assert all(each.is_meta for each in ours.values())
    assert all(name in weights.sources for name in ours)
    count = sum(each.numel() for each in ours.values())
    if not config.get_text_config().tie_word_embeddings:
        count += ours["decoder.embedding.weight"].numel()  # the head, which is not read
    assert count == theirs
    assert published["parameters"] in (theirs, None)


def is_frozen_llm(name: str) -> bool:
    return name == "objective.norm" or name.startswith("decoder.") and ".student." not in name


LENGTH = 32
THETA = {"rope_type": "default", "rope_theta": 33.0}
FULL = ["full_attention"] * 3
VALUES: dict[str, list[Any]] = {  # of every field that some family has, but for sizes
    "attention_bias": [True],
    "mlp_bias": [True],
    "head_dim": [16],
    "hidden_act": ["gelu_pytorch_tanh", "gelu", "relu", "silu"],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu", "silu", None],
    "initializer_range": [0.5],
    "use_cache": [False],
    "pad_token_id": [7],
    "bos_token_id": [8],
    "eos_token_id": [[9, 10]],
    "tie_word_embeddings": [True, False],
    "pretraining_tp": [2],
    "attention_dropout": [0.5],
    "resid_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "logits_scaling": [3.0],
    "final_logit_softcapping": [0.5],
    "attn_logit_softcapping": [0.5, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1],
    "sliding_window": [8, 64, None],
    "layer_types": [FULL, [*FULL[:2], "sliding_attention"]],
    "no_rope_layer_interval": [2],
    "no_rope_layers": [[0, 1, 1]],
    "use_bidirectional_attention": [True],
    "is_causal": [False],
    "embedding_multiplier": [3.0],
    "residual_multiplier": [0.5],
    "attention_multiplier": [0.7],
    "query_pre_attn_scalar": [3],
    "rms_norm_eps": [0.3],
    "max_position_embeddings": [16, 512],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5],
    "rope_theta": [33.0],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
    "rope_parameters": [
        THETA,
        THETA | {"partial_rotary_factor": 0.5},
        THETA | {"rope_type": "linear", "factor": 2.0},
        {"sliding_attention": THETA, "full_attention": THETA},
    ],
}
CHANGES = [{field: value} for field, values in VALUES.items() for value in values]
CHANGES += [{"sliding_window": 8, "layer_types": kinds} for kinds in (FULL, MIXED)]
SIZES_OF_TENSORS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
SIZES_OF_TENSORS |= {"num_attention_heads", "num_key_value_heads"}
LIMITS = {"max_length", "limit", "is_bidirectional"}  # of what is read, not of how


def own_fields(family: str) -> set[str]:
    """Of a family's configuration, beside those that all models have."""
    fields = [dataclasses.fields(kind) for kind in (CONFIG_MAPPING[family], PreTrainedConfig)]
    own, common = ({field.name for field in each} for each in fields)
    return own - common


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_field_of_a_configuration_is_decided_about(family: str):
    assert own_fields(family) <= families.decided(family)
    assert own_fields(family) <= VALUES.keys() | SIZES_OF_TENSORS, "add values of it here"


def states_under(config: PreTrainedConfig) -> torch.Tensor:
    """transformers' own (1, L, D), of the same weights under any configuration."""
    model = AutoModel.from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    model = randomise_weights(model).eval()
    ids_BL = torch.arange(1, LENGTH + 1)[None]
    with torch.no_grad():
        return model(input_ids=ids_BL, use_cache=False).last_hidden_state


def spec_of(config: PreTrainedConfig) -> dict[str, Any]:
    """By layer, whichever order kinds of ropes are listed in."""
    spec = dataclasses.asdict(decoder_spec(config))
    ropes = spec.pop("ropes")
    of_layers = [None if index is None else ropes[index] for index in spec["rope_of"]]
    return spec | {"rope_of": of_layers}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_changes_states_is_applied_or_refused_and_nothing_else_is(family: str):
    """Of other families' fields too, which configurations on the hub carry along."""
    plain = small_config(family)
    states, spec, seen = states_under(plain), spec_of(plain), []
    for change in CHANGES:
        try:
            config = small_config(family, **change)
            changes_states = not torch.allclose(states_under(config), states, atol=1e-6)
        except Exception:  # transformers itself takes no such value
            continue
        seen.append((change, *judged(config, spec, changes_states)))
        if changes_states and change.keys() & {*families.WITHOUT_INFLUENCE}:
            seen.append((change, False, "it has influence"))
    assert len(seen) > len(CHANGES) / 2
    wrong = [f"{change}: {what}" for change, is_right, what in seen if not is_right]
    assert not wrong, "\n".join(wrong)


def judged(
    config: PreTrainedConfig, plain: dict[str, Any], changes_states: bool
) -> tuple[bool, str]:
    """Whether we read a change of a configuration as transformers does, and how not."""
    try:
        spec = spec_of(config)
    except ValueError:
        return True, ""
    except Exception as error:
        return False, f"no ValueError: {error!r}"
    changed = {key for key in spec if spec[key] != plain[key]}
    # What is not read at all, or not causally, is refused where a run says what it reads.
    if spec["max_length"] < LENGTH or "is_bidirectional" in changed:
        return True, ""
    changed -= LIMITS
    how = f"theirs {'changes' if changes_states else 'does not'}, of ours {changed or 'nothing'}"
    return changes_states == bool(changed), how
