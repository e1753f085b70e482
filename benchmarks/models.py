"""The models that a benchmark runs: the config's, or random weights at known models' shapes."""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, M2M100Config, PreTrainedConfig
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_engine.config import Config
from mtllm_engine.model import known
from mtllm_engine.model.build import build_stack, read_encoder
from mtllm_engine.model.families import decoder_spec, read_config
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.tensors import TensorFiles, resolve
from mtllm_engine.model.weights import Weights
from mtllm_engine.training.engine import MOMENTS, TrainedState, shard
from mtllm_engine.world import World


def encoder_module(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """transformers' own, with the default device's memory."""
    if isinstance(config, M2M100Config):
        return M2M100Encoder(config)
    return PaddedEncoder(config, dtype).module


ENCODERS: dict[str, PreTrainedConfig] = {
    "nllb600m": known.ENCODERS["nllb-200-distilled-600m"],
    "e5_small": known.ENCODERS["multilingual-e5-small"],
    "nllb3b": known.ENCODERS["nllb-200-3.3b"],
    "tiny": M2M100Config(
        vocab_size=2000,
        d_model=128,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=384,
        scale_embedding=True,
    ),
}
DECODERS: dict[str, PreTrainedConfig] = {
    "llama3_8b": known.DECODERS["llama-3-8b"],
    "llama3_70b": known.DECODERS["llama-3-70b"],
    "qwen3_8b": known.DECODERS["qwen3-8b"],
    "gemma3_4b": known.DECODERS["gemma-3-4b"],
    "smollm2_135m": known.DECODERS["smollm2-135m"],
    "tiny": LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=8192,
        rope_parameters=known.ROPE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Models:
    """Our stack, filled, and what fills transformers' modules with the same weights."""

    encoder: PreTrainedConfig
    decoder: PreTrainedConfig
    stack: Stack
    weights: Weights
    trained: TrainedState  # what training starts from: every adapter at work, lora_B too

    @property
    def matmul_parameters(self) -> int:
        """N of the work: the LLM's matrices without embeddings."""
        frozen = (item for item in self.stack.decoder.layers.parameters() if not item.requires_grad)
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in frozen]
        shapes += [weight.shape for weight in quantised_weights(self.stack)]
        return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def build_models(config: Config, shape: str, world: World) -> Models:
    """Args: shape: DECODER+ENCODER for random weights; empty for the checkpoints that the config
    names.

    Raises:
        ValueError: A checkpoint or a shape is not there.
    """
    if shape:
        encoder, decoder = _parse_shape(shape)
        dtype = getattr(torch, config.model.dtype)
        with torch.device("meta"):
            stack = Stack(config, encoder, decoder_spec(decoder))
            theirs = (encoder_module(encoder, dtype), AutoModel.from_config(decoder))
        sides = (_Random(module, world.device, dtype) for module in theirs)
        options = {"seed": config.run.seed, "projection_init": config.model.projection_init}
        weights = Weights(stack, *sides, **options)
    else:
        stack, weights = build_stack(config)
        encoder = read_encoder(resolve(config.model.encoder))
        decoder = read_config(resolve(config.model.decoder), "model.decoder").get_text_config()
    trained = {
        name: _start(name, item.shape)
        for name, item in stack.named_parameters()
        if item.requires_grad
    }
    stack = shard(stack, weights, config, world)
    return Models(encoder=encoder, decoder=decoder, stack=stack, weights=weights, trained=trained)


def frozen_tensors(models: Models, side: str) -> dict[str, Callable[[], torch.Tensor]]:
    """What fills transformers' module of a side ("encoder", "decoder"), by its parameters' names.

    In one process these are views of our own weights: nothing is stored twice. Under ZeRO-3, and
    where ours are quantised or hold other numbers than the file, they are read again.
    """
    sources, ours = models.weights.sources, dict(models.stack.named_parameters())
    files = sources[f"{side}.embedding.weight"].files
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for name in models.weights.shapes:
        if name not in sources or sources[name].files is not files:
            continue
        parameter, row = ours.get(name), 0
        for full_name in sources[name].names:
            short = (
                "embed_tokens.weight" if name.endswith("embedding.weight") else _short(full_name)
            )
            shape = files.shape(full_name)
            is_other = parameter is None or hasattr(parameter, "ds_tensor") or sources[name].offset
            if is_other:
                readers[short] = functools.partial(
                    _read, files, full_name, ours[f"{side}.embedding.weight"]
                )
            else:
                readers[short] = functools.partial(
                    parameter.data.__getitem__, slice(row, row + shape[0])
                )
            row += shape[0]
    return readers


def _read(files: TensorFiles, name: str, like: torch.Tensor) -> torch.Tensor:
    shape = files.shape(name)
    return files.read(name, 0, math.prod(shape)).view(shape).to(like.device, like.dtype)


def _short(name: str) -> str:
    """Such as `layers.0.fc1.bias` of `model.encoder.layers.0.fc1.bias`, or `norm.weight`."""
    return name[name.index("layers.") :] if "layers." in name else ".".join(name.split(".")[-2:])


def _start(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_seed(name))
    value = torch.randn(shape, generator=generator) * 0.5 * shape[-1] ** -0.5
    return {"value": value, **{key: torch.zeros(shape) for key in MOMENTS}}


class _Random:
    """Looks like `TensorFiles`; a tensor is drawn, from its name, where it is needed."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = "random weights", device, dtype
        self.shapes = {
            name: tuple(parameter.shape) for name, parameter in module.named_parameters()
        }
        self._latest = functools.lru_cache(maxsize=1)(self._draw)

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._latest(name).view(-1)[start:stop]

    def _draw(self, name: str) -> torch.Tensor:
        """Matrices that keep the size of what they multiply, norms about 1, small biases."""
        generator = torch.Generator(self.device).manual_seed(_seed(name))
        shape = self.shapes[name]
        values = torch.empty(shape, device=self.device, dtype=self.dtype)
        values.normal_(generator=generator)
        if len(shape) == 2:
            return values.mul_(shape[-1] ** -0.5)
        return values.mul_(0.1).add_(float(name.endswith("norm.weight")))


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def _parse_shape(text: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    decoder, _, encoder = text.partition("+")
    if decoder not in DECODERS or encoder not in ENCODERS:
        known = f"{'|'.join(DECODERS)}+{'|'.join(ENCODERS)}, such as llama3_8b+nllb600m"
        raise ValueError(f"--random-weights {text}: write one of {known}")
    return ENCODERS[encoder], DECODERS[decoder]
