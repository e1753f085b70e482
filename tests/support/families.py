"""Tiny random LLMs of every family, made with the installed transformers' own classes."""

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.support.tiny import build_llm_tokenizer

LONGEST = 64  # data.max_length of `tiny.build_config`
POSITIONS = 256
WRAPPERS = ("gemma3", "mistral3")  # text and images; the text's part is read

# What rope types ask for beside theta. Frequencies that differ between `short` and `long` are
# told apart by which of them a text of `LONGEST` tokens meets.
ROPES: dict[str, Callable[[int], dict]] = {
    "default": lambda turning: {},
    "linear": lambda turning: {"factor": 3.0},
    "dynamic": lambda turning: {"factor": 2.0},
    "yarn": lambda turning: {"factor": 4.0, "original_max_position_embeddings": LONGEST},
    "longrope": lambda turning: {
        "factor": 4.0,
        "original_max_position_embeddings": LONGEST,
        "short_factor": [1.0 + 0.1 * index for index in range(turning // 2)],
        "long_factor": [2.0 + 0.5 * index for index in range(turning // 2)],
    },
    "llama3": lambda turning: {
        "factor": 4.0,
        "original_max_position_embeddings": LONGEST,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": lambda turning: {"factor": 2.0, "partial_rotary_factor": 0.5},
}
MSCALES = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}


def rope(kind: str, turning: int, theta: float = 1e4, **keys) -> dict:
    """Args: turning: How many of a head's channels turn."""
    return {"rope_type": kind, "rope_theta": theta, **ROPES[kind](turning), **keys}


# What is drawn first is what differs most: few examples are drawn but for a long proof.
EITHER = st.sampled_from([True, False])


@st.composite
def ropes(draw: st.DrawFn, turning: int) -> dict:
    kind, theta = draw(st.sampled_from(["yarn", *ROPES])), draw(st.sampled_from([1e2, 1e4, 5e5]))
    keys = MSCALES if kind == "yarn" and draw(EITHER) else {}
    return rope(kind, turning, theta, **keys)


@st.composite
def sizes(draw: st.DrawFn, *, head_dim: bool = True, layers: int = 2) -> dict:
    """What every configuration says. Args: head_dim: whether heads may be of any width."""
    heads, head_width = (
        draw(st.sampled_from(each)) for each in ([4, 3, 2, 1], [16, 8, 12, 20, 24])
    )
    if head_dim:
        width = heads * draw(st.integers(-(-32 // heads), 96 // heads))
    else:  # as wide as its heads: fewer than 32 channels make states that roundings move far
        heads = max(heads, -(-32 // head_width))
        width = heads * head_width
    keys = {
        "vocab_size": draw(st.integers(48, 96)),
        "hidden_size": width,
        "intermediate_size": 2 * draw(st.integers(8, 48)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(
            st.sampled_from([kv for kv in (2, 1, 3, 4, 5) if heads % kv == 0])
        ),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": draw(st.sampled_from([1e-3, 1e-6, 1e-5])),
        "tie_word_embeddings": draw(EITHER),
        "pad_token_id": draw(st.sampled_from([0, None])),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return keys | ({"head_dim": head_width} if head_dim else {})


def turning_of(keys: dict) -> int:
    return keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])


@st.composite
def llamas(draw: st.DrawFn, kind: str = "") -> LlamaConfig:
    """Args: kind: of its rotary embedding; "": any."""
    keys = draw(sizes(head_dim=draw(EITHER)))
    keys |= {name: draw(EITHER) for name in ("attention_bias", "mlp_bias")}
    turning = turning_of(keys)
    keys |= {"rope_parameters": rope(kind, turning) if kind else draw(ropes(turning))}
    return LlamaConfig(**keys)


WINDOWS = st.sampled_from([LONGEST, None, 4096])  # such that it is a whole text's or more


@st.composite
def mistrals(draw: st.DrawFn) -> MistralConfig:
    keys = draw(sizes())
    keys |= {"sliding_window": draw(WINDOWS), "rope_parameters": draw(ropes(keys["head_dim"]))}
    return MistralConfig(**keys)


@st.composite
def layer_kinds(draw: st.DrawFn, layers: int) -> list[str]:
    """Both kinds of layers, in any order."""
    kinds = ["sliding_attention", "full_attention"]
    more = st.lists(st.sampled_from(kinds), min_size=layers - 2, max_size=layers - 2)
    return draw(st.permutations([*kinds, *draw(more)]))


@st.composite
def ministrals(draw: st.DrawFn) -> MinistralConfig:
    keys = draw(sizes(layers=3))
    keys |= {"sliding_window": LONGEST, "layer_types": draw(layer_kinds(3))}
    return MinistralConfig(**keys, rope_parameters=draw(ropes(keys["head_dim"])))


@st.composite
def ministrals3(draw: st.DrawFn) -> Ministral3Config:
    keys = draw(sizes())
    scaled = rope("yarn", keys["head_dim"], llama_4_scaling_beta=0.1, **MSCALES)
    keys |= {"sliding_window": draw(WINDOWS)}
    return Ministral3Config(**keys, rope_parameters=scaled)


def qwens(kind: type[PreTrainedConfig]) -> st.SearchStrategy:
    @st.composite
    def draws(draw: st.DrawFn) -> PreTrainedConfig:
        keys = draw(sizes(head_dim=kind is Qwen3Config, layers=3))
        if kind is Qwen3Config:
            keys |= {"attention_bias": draw(EITHER)}
        if draw(EITHER):
            keys |= {"use_sliding_window": True, "sliding_window": LONGEST, "max_window_layers": 1}
        return kind(**keys, rope_parameters=draw(ropes(turning_of(keys))))

    return draws()


@st.composite
def smollms(draw: st.DrawFn) -> SmolLM3Config:
    keys = draw(sizes(head_dim=False, layers=3))
    keys |= {name: draw(EITHER) for name in ("attention_bias", "mlp_bias")}
    keys |= {"no_rope_layers": draw(st.permutations([0, 1, 1]))}
    keys |= {"use_sliding_window": draw(EITHER), "sliding_window": LONGEST}
    return SmolLM3Config(**keys, rope_parameters=draw(ropes(turning_of(keys))))


@st.composite
def granites(draw: st.DrawFn) -> GraniteConfig:
    keys = draw(sizes(head_dim=False))
    keys |= {name: draw(EITHER) for name in ("attention_bias", "mlp_bias")}
    keys |= {
        "embedding_multiplier": draw(st.sampled_from([12.0, 1])),
        "residual_multiplier": draw(st.sampled_from([0.22, 1.0])),
        "attention_multiplier": draw(st.sampled_from([0.0625, 0.3, 1.0])),
        "logits_scaling": 8.0,
    }
    return GraniteConfig(**keys, rope_parameters=draw(ropes(turning_of(keys))))


@st.composite
def olmos(draw: st.DrawFn) -> Olmo2Config:
    keys = draw(sizes(head_dim=False))
    keys |= {"attention_bias": draw(EITHER)}
    return Olmo2Config(**keys, rope_parameters=draw(ropes(turning_of(keys))))


@st.composite
def phis(draw: st.DrawFn, kind: str) -> Phi3Config:
    keys = draw(sizes(head_dim=False))
    share = draw(st.sampled_from([0.75, 0.5, 1.0]))
    turning = int(turning_of(keys) * share)
    if turning % 2:
        share, turning = 1.0, turning_of(keys)
    keys |= {"original_max_position_embeddings": LONGEST, "sliding_window": draw(WINDOWS)}
    return Phi3Config(**keys, rope_parameters=rope(kind, turning, partial_rotary_factor=share))


@st.composite
def gemmas(draw: st.DrawFn) -> GemmaConfig:
    keys = draw(sizes())
    keys |= {"attention_bias": draw(EITHER)}
    return GemmaConfig(**keys, rope_parameters=draw(ropes(keys["head_dim"])))


@st.composite
def gemmas2(draw: st.DrawFn) -> Gemma2Config:
    keys = draw(sizes(layers=3))
    keys |= {
        "attention_bias": draw(EITHER),
        "query_pre_attn_scalar": draw(st.sampled_from([5, 16])),
        "sliding_window": LONGEST,
        "layer_types": draw(layer_kinds(3)),
        "attn_logit_softcapping": draw(st.sampled_from([2.0, 50.0, None])),
    }
    return Gemma2Config(**keys, rope_parameters=draw(ropes(keys["head_dim"])))


@st.composite
def gemmas3(draw: st.DrawFn) -> Gemma3TextConfig:
    keys = draw(sizes(layers=3))
    head_width = keys["head_dim"]
    keys |= {
        "attention_bias": draw(EITHER),
        "query_pre_attn_scalar": draw(st.sampled_from([5, 16])),
        "sliding_window": LONGEST,
        "layer_types": draw(layer_kinds(3)),
        "rope_parameters": {
            "sliding_attention": rope("default", head_width),
            "full_attention": draw(ropes(head_width)),
        },
    }
    return Gemma3TextConfig(**keys)


def with_images(text: Gemma3TextConfig) -> Gemma3Config:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "vision_use_head": False}
    tokens = {"boi_token_index": 45, "eoi_token_index": 46, "image_token_index": 47}
    options = {"mm_tokens_per_image": 4, "tie_word_embeddings": True, **tokens}
    return Gemma3Config(text_config=text.to_dict(), vision_config=vision, **options)


@st.composite
def mistrals3_with_images(draw: st.DrawFn) -> Mistral3Config:
    text = draw(st.one_of(mistrals(), ministrals3())).to_dict()
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)


FAMILIES: dict[str, st.SearchStrategy] = {  # every family, and Llama with every rope type
    **{f"llama-{kind}": llamas(kind) for kind in ROPES},
    "mistral": mistrals(),
    "ministral": ministrals(),
    "ministral3": ministrals3(),
    "qwen2": qwens(Qwen2Config),
    "qwen3": qwens(Qwen3Config),
    "smollm3": smollms(),
    "granite": granites(),
    "olmo2": olmos(),
    "phi3": phis("default"),
    "phi3-longrope": phis("longrope"),
    "gemma": gemmas(),
    "gemma2": gemmas2(),
    "gemma3_text": gemmas3(),
    "gemma3": gemmas3().map(with_images),
    "mistral3": mistrals3_with_images(),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def linears_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """What LoRA targets, by PEFT's names."""
    return FUSED if config.model_type == "phi3" else LINEARS


def write_llm(folder: Path, config: PreTrainedConfig, *, seed: int = 0, **options) -> Path:
    """A checkpoint with random weights, norms and biases included."""
    torch.manual_seed(seed)
    is_wrapper = config.model_type in WRAPPERS
    auto = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    randomise_weights(auto.from_config(config)).save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def randomise_weights(model: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model shows in its output."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "embed" in name:
            parameter.normal_(std=0.5)
        elif parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def load_text_model(folder: str | Path) -> nn.Module:
    """transformers' own model of the text, fp32."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return getattr(model, "language_model", model).eval()


class Doubled(TorchFunctionMode):
    """Where a module asks for fp32, whatever its own dtype, it gets fp64."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        wide = {torch.float32: torch.float64}
        args = [wide.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        kwargs = {
            key: wide.get(each, each) if isinstance(each, torch.dtype) else each
            for key, each in (kwargs or {}).items()
        }
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL_OF = {  # what else a small one of a family has
    "ministral": {"head_dim": 8, "sliding_window": 64, "layer_types": MIXED},
    "ministral3": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 64, "layer_types": MIXED},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "layer_types": MIXED},
}


def small_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A family's, as if it had been read from a file that says `changes`, too."""
    if family == "gemma3":
        return with_images(small_config("gemma3_text", **changes))
    keys = SMALL | SMALL_OF.get(family, {}) | changes
    return CONFIG_MAPPING[family].from_dict(copy.deepcopy(keys))


def build_llm(folder: Path, family: str, **changes: Any) -> Path:
    """A family's small LLM with its tokenizer."""
    num_tokens = build_llm_tokenizer(folder)
    return write_llm(folder, small_config(family, vocab_size=num_tokens, **changes))


def write_headers(folder: Path, config: PreTrainedConfig) -> int:
    """A checkpoint of a model's names and shapes, a file for each layer, whose numbers take no
    place on the disk.

    Returns:
        How many numbers.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    prefix = "language_model." if text is not config else ""
    shapes = {f"{prefix}{name}": list(each.shape) for name, each in model.named_parameters()}
    files = {name: re.sub(r"(layers\.\d+)\..*", r"\1", name) + ".safetensors" for name in shapes}
    for file in set(files.values()):
        write_header(folder / file, {name: shapes[name] for name in shapes if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sum(map(math.prod, shapes.values()))


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
