"""Encoders beside M2M-100, by transformers' own classes: packed documents are padded in groups of
about equal length, run, and packed again.

Such an encoder is none of the stack's modules: it is whole on every rank, frozen, always in
evaluation, and neither ZeRO-3's hooks nor the optimizer see it. Beside an LLM it takes a few
percent of a step, where a well-kept library beats code of our own.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from mtllm_engine.data.batch import Tokens

MAX_PADDING = 0.12
"""The share of a group's tokens that may be padding."""
GROUP_TOKENS = 16384
"""Of a group, padding included; a longer text is a group by itself."""
NEUTRAL = {  # what would change what comes out, but not the states
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How transformers has one kind of encoder."""

    model: str
    """The class that opens a checkpoint as it is published."""
    alone: str = ""
    """The class that is the encoder and nothing else, where that one is more."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it is built with, beside its configuration."""
    part: str = ""
    """The module of it that is the encoder; "": all of it is."""
    embedding: str
    """The parameter of the encoder that is its token embedding."""
    shared: tuple[str, ...]
    """Under which full names a checkpoint may have that one instead."""
    norm: str
    """What the last norm is called, by the last layer's number."""
    num_positions: Callable[[PreTrainedConfig], int] | None = None
    """Tokens of the longest text; None: there is no such limit."""

    @property
    def class_alone(self) -> str:
        """What opens the encoder where it is stored alone."""
        return self.alone or self.model

    def name_alone(self, name: str) -> str:
        """What that class calls a parameter of the encoder."""
        if not self.part or self.alone:
            return name
        return self.shared[0] if name == self.embedding else f"{self.part}.{name}"


def _positions(config: PreTrainedConfig) -> int:
    return config.max_position_embeddings


def _positions_after_padding(config: PreTrainedConfig) -> int:
    return config.max_position_embeddings - config.pad_token_id - 1  # fairseq's numbering


_encoder_only = functools.partial(
    Family,
    options={"add_pooling_layer": False},
    embedding="embeddings.word_embeddings.weight",
    norm="encoder.layer.{last}.output.LayerNorm",
)
_roberta = functools.partial(
    _encoder_only, shared=("lm_head.decoder.weight",), num_positions=_positions_after_padding
)
_t5 = functools.partial(
    Family,
    part="encoder",
    embedding="embed_tokens.weight",
    shared=("shared.weight", "decoder.embed_tokens.weight", "transformer.shared.weight"),
    norm="final_layer_norm",
)
FAMILIES = {  # by model_type
    "bert": _encoder_only(
        model="BertModel", shared=("cls.predictions.decoder.weight",), num_positions=_positions
    ),
    "xlm-roberta": _roberta(model="XLMRobertaModel"),
    "xlm-roberta-xl": _roberta(model="XLMRobertaXLModel", norm="encoder.LayerNorm"),
    "mbart": Family(
        model="MBartModel",
        alone="MBartEncoder",
        part="encoder",
        embedding="embed_tokens.weight",
        shared=("model.shared.weight", "shared.weight", "model.decoder.embed_tokens.weight")
        + ("decoder.embed_tokens.weight", "lm_head.weight"),
        norm="layer_norm",
        num_positions=_positions,
    ),
    "t5": _t5(model="T5EncoderModel"),
    "mt5": _t5(model="MT5EncoderModel"),
    "umt5": _t5(model="UMT5EncoderModel"),
}


def check_encoder(config: PreTrainedConfig) -> None:
    """Raises: ValueError: It is of a family that goes in, and yet not such an encoder."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"its config.json says that this {config.model_type} is a decoder")
    counts = FAMILIES[config.model_type].num_positions is _positions_after_padding
    if counts and config.pad_token_id is None:
        fix = "positions count from it: set it to the tokenizer's, 1 of XLM-R"
        raise ValueError(f"pad_token_id is null in its config.json, and {fix}")


class PaddedEncoder:
    """Token ids to normed states. Its weights come after it is built, by `materialise` and whoever
    fills `named_parameters`.

    Raises:
        ValueError: transformers refuses the configuration.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self.family = FAMILIES[config.model_type]
        self.config = copy.deepcopy(config)
        self.config.update(NEUTRAL)
        build = getattr(transformers, self.family.model)._from_config
        options = {"attn_implementation": "sdpa", "dtype": dtype, **self.family.options}
        try:
            with torch.device("meta"):
                model = build(self.config, **options)
        except (ValueError, AssertionError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model.encoder: {self.family.model} refuses it: {reason}") from error
        self.module: nn.Module = getattr(model, self.family.part) if self.family.part else model
        self.module.eval().requires_grad_(False)
        self.is_filled = False
        self.num_run = self.num_read = 0
        """Tokens until now, with padding and without."""

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return self.forward(tokens)

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> torch.Tensor:
        """States (S, E) in the model's dtype; nothing is asked of the device."""
        groups = grouped(tokens.lengths)
        places_S, num_places = _places(tokens.lengths, groups)
        places_S = torch.from_numpy(places_S).to(tokens.ids_S.device, non_blocking=True)
        # The groups one after the other, each (B, L) flattened: I places in all.
        ids_I = tokens.ids_S.new_full((num_places,), self.config.pad_token_id or 0)
        ids_I = ids_I.index_copy_(0, places_S, tokens.ids_S)
        is_real_I = torch.zeros_like(ids_I, dtype=torch.bool).index_fill_(0, places_S, True)
        states, start = [], 0
        for group in groups:
            shape, is_padded = _shape(tokens.lengths, group)
            stop = start + shape[0] * shape[1]
            is_real_BL = is_real_I[start:stop].view(shape) if is_padded else None
            states.append(self._run(ids_I[start:stop].view(shape), is_real_BL).flatten(0, 1))
            start = stop
        self.num_run += num_places
        self.num_read += sum(tokens.lengths)
        return torch.cat(states).index_select(0, places_S)

    def materialise(self, device: torch.device) -> None:
        """Takes memory for the parameters, which then hold anything, and makes the buffers anew."""
        self.module.to_empty(device=device)
        for part in self.module.modules():
            if part._buffers:
                self.module._init_weights(part)  # by transformers' own formula

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    @property
    def embedding(self) -> nn.Embedding:
        return self.module.get_input_embeddings()

    @property
    def norms(self) -> list[str]:
        """The parameters of the last norm: its weight and, if it has one, its bias."""
        prefix = self.family.norm.format(last=self.config.num_hidden_layers - 1)
        return [name for name, _ in self.named_parameters() if name.startswith(f"{prefix}.")]

    @property
    def linears(self) -> list[nn.Linear]:
        return [part for part in self.module.modules() if isinstance(part, nn.Linear)]

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def inner_width(self) -> int:
        """Of the widest linear."""
        return max(linear.out_features for linear in self.linears)

    @property
    def num_biases(self) -> int:
        """What attention adds to each pair of tokens: a number for each head, or none."""
        has_some = any("relative_attention_bias" in name for name, _ in self.named_parameters())
        return self.config.num_attention_heads * has_some

    @property
    def num_weights(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    @property
    def padding(self) -> float:
        """The share of all tokens run until now that was padding."""
        return (self.num_run - self.num_read) / max(1, self.num_run)

    def most_tokens(self, max_tokens: int) -> int:
        """Of the largest group of a micro-batch, padding included."""
        return min(GROUP_TOKENS, int(max_tokens / (1 - MAX_PADDING)))

    def __str__(self) -> str:
        groups = f"padded in groups of up to {GROUP_TOKENS:,} tokens"
        padding = f"at most {MAX_PADDING:.0%} of a group padding"
        return f"transformers' {type(self.module).__name__}, sdpa, {groups}, {padding}"

    def _run(self, ids_BL: torch.Tensor, is_real_BL: torch.Tensor | None) -> torch.Tensor:
        mask = None
        if is_real_BL is not None:
            # In this form nobody looks whether there is any padding, which would wait for the
            # device.
            mask = is_real_BL[:, None, None, :].expand(-1, 1, ids_BL.shape[1], -1)
        return self.module(input_ids=ids_BL, attention_mask=mask).last_hidden_state


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Documents by their number, in groups that are padded to their first, which is the longest.

    A group is as large as `MAX_PADDING` and `GROUP_TOKENS` let it be; a document alone has no
    padding.
    """
    groups: list[list[int]] = []
    longest = real = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        size = longest * (len(groups[-1]) + 1) if groups else 0
        if groups and size <= GROUP_TOKENS and size - real - length <= MAX_PADDING * size:
            groups[-1].append(number)
            real += length
        else:
            groups.append([number])
            longest = real = length
    return groups


def _places(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
    """Where each packed token lies among the padded ones, int64 (S,), and how many those are."""
    first_N, end = np.zeros(len(lengths), np.int64), 0
    for group in groups:
        for number in group:
            first_N[number] = end
            end += lengths[group[0]]
    starts_N = np.cumsum([0, *lengths[:-1]])
    return np.arange(sum(lengths)) + np.repeat(first_N - starts_N, lengths), end


def _shape(lengths: Sequence[int], group: Sequence[int]) -> tuple[tuple[int, int], bool]:
    """A group's (B, L), and whether any of it is padding."""
    longest = lengths[group[0]]
    return (len(group), longest), lengths[group[-1]] < longest
