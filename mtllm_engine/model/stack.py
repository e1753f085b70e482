"""The stack: MT encoder -> projection -> LLM with adapters, and the LLM without them, or with a
task's, as teacher.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import M2M100Config, PreTrainedConfig

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.data.batch import Batch, Parts, Totals
from mtllm_engine.kernels.attention import select
from mtllm_engine.kernels.projection import projection
from mtllm_engine.model.decoder import Decoder, norm_weight
from mtllm_engine.model.encoder import Encoder
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.model.objective import (
    Distillation,
    HeadSize,
    Share,
    build_head,
    build_reading,
)
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.world import device_type

LAYER_NORM_EPS = 1e-5  # PyTorch's default, which M2M-100 uses


class Projection(nn.Module):
    """The encoder's final LayerNorm (frozen), where the encoder leaves it to us, and the trained
    Linear(E -> D), fp32 parameters.
    """

    def __init__(
        self, in_width: int, out_width: int, dtype: torch.dtype, *, bias: bool, norms: bool
    ) -> None:
        super().__init__()
        self.norm_weight = self.norm_bias = None
        if norms:
            self.norm_weight = nn.Parameter(torch.empty(in_width, dtype=dtype))
            self.norm_bias = nn.Parameter(torch.empty(in_width, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if bias else None

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        if self.norm_weight is None:
            dtype = hidden_SE.dtype
            bias_D = None if self.bias is None else self.bias.to(dtype)
            return functional.linear(hidden_SE, self.weight.to(dtype), bias_D)
        return projection(
            hidden_SE, self.norm_weight, self.norm_bias, LAYER_NORM_EPS, self.weight, self.bias
        )


def interleave(states_UD: torch.Tensor, between_ZD: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The student's stream (S, D): the encoder's projected states, and between parts the LLM's own
    embeddings, which get no gradient. Each place is written once; backward is one gather.
    """
    hidden_SD = states_UD.new_empty(len(states_UD) + len(between_ZD), states_UD.shape[1])
    hidden_SD.index_copy_(0, parts.places_Z, between_ZD)
    return hidden_SD.index_copy_(0, parts.places_U, states_UD)


class Stack(nn.Module):
    """The one root module: a single forward runs encoder, student, teacher and loss.

    A second engine call per micro-batch would invalidate ZeRO-3's prefetch trace every time. With
    `objective.reader` = "llm" there is neither encoder nor projection: the LLM reads its own
    tokens, as it does when it learns a task.

    Args:
        head: Of the task.
        frozen_rank: Of the student's adapters, what does not learn.
        teacher: The fine-tuned LLM's adapters; None: the teacher is the bare LLM.
        learns: Or nothing is trained.
        device: "cpu" or "cuda", whose attention is taken; by default where ranks train.
    """

    def __init__(
        self,
        config: Config,
        encoder: PreTrainedConfig,
        decoder: DecoderSpec,
        *,
        head: HeadSize | None = None,
        frozen_rank: int = 0,
        teacher: LoraConfig | None = None,
        learns: bool = True,
        device: str = "",
    ) -> None:
        super().__init__()
        dtype, width = getattr(torch, config.model.dtype), decoder.width
        asked, on = config.model.attention, device or device_type()
        self.attention = select(asked, on, decoder.softcap, decoder.head_width)
        self.learns, self.reads_stack = learns, config.objective.reader == "stack"
        # What is below the LLM.
        self.encoder = self.projection = None
        if self.reads_stack:
            is_ours = isinstance(encoder, M2M100Config)
            if is_ours:
                head_width = encoder.d_model // encoder.encoder_attention_heads
                self.encoder = Encoder(encoder, dtype, select(asked, on, width=head_width))
            else:  # no module, hence no part of what is sharded, trained or cast
                self.encoder = PaddedEncoder(encoder, dtype)
            options = {"bias": config.model.projection_bias, "norms": is_ours}
            self.projection = Projection(encoder.hidden_size, width, dtype, **options)
        # The LLM, with the student's adapters and, if it has learned a task, the teacher's.
        adapters = {"student": config.lora}
        if teacher:
            adapters["teacher"] = replace(teacher, dropout=0.0)
        self.teacher = "teacher" if teacher else None
        options = {
            "causal": config.model.causal,
            "recompute": config.memory.recompute,
            "defers": config.model.lora_update == "swiglu",
        }
        self.decoder = Decoder(decoder, adapters, dtype, self.attention, **options)
        if frozen_rank:
            self._split_adapters(frozen_rank)
        # What the states are for.
        norm = norm_weight(decoder, width, dtype)  # the LLM's final one
        parts = (norm, decoder.eps, build_head(width, head))
        if config.objective.kind == "distil":
            weight = config.objective.token_weight
            self.objective = Distillation(*parts, token_weight=weight)
        else:
            self.objective = build_reading(
                *parts, side="student" if self.reads_stack else "teacher"
            )
        self._freeze()

    def forward(self, batch: Batch, totals: Totals) -> Share:
        """The micro-batch's share of the loss; `totals` counts what all ranks'
        micro-batches hold.
        """
        teaches = isinstance(self.objective, Distillation) and batch.targets_PD is None
        hidden = self._hidden(batch, teaches=teaches)
        read = batch.student if self.reads_stack else batch.teacher
        streams = [self.decoder.stream(read, adapters="student", grad=True)]
        if teaches:
            stream = self.decoder.stream(batch.teacher, adapters=self.teacher, grad=False)
            streams.append(stream)
        return self.objective(batch, totals, *self.decoder(hidden, streams))

    def read(
        self, batch: Batch, *, side: Literal["student", "teacher"], adapters: str | None
    ) -> torch.Tensor:
        """The states (S, D) before the final norm, without gradient: the stack's of the student's
        tokens, or the LLM's of its own.

        Args:
            adapters: The set that runs; None: the bare LLM.
        """
        if side == "student":
            (hidden_SD,) = self._hidden(batch, teaches=False)
        else:
            hidden_SD = self.decoder.embed(batch.teacher.ids_S)
        stream = self.decoder.stream(getattr(batch, side), adapters=adapters, grad=False)
        (hidden_SD,) = self.decoder([hidden_SD], [stream])
        return hidden_SD

    def flops(self, stored_states: bool) -> tuple[int, int]:
        """Of a student's and of a teacher's token, before the stack is sharded; attention and
        adapters aside. What stands between parts counts as an encoder's token too.

        A weight costs 2 forward and 2 for the input's gradient; frozen ones have no gradient of
        their own.

        Args:
            stored_states: The teacher does not run.
        """
        decoder = sum(
            each.weight.numel() for each in self.modules() if isinstance(each, LoraLinear)
        )
        if not self.reads_stack:
            return 0, (4 if self.learns else 2) * decoder
        below = [*self.projection.parameters()]
        if isinstance(self.encoder, PaddedEncoder):
            below += [linear.weight for linear in self.encoder.linears]
        else:
            below += self.encoder.layers.parameters()
        encoder = sum(item.numel() for item in below if item.dim() == 2)
        teaches = isinstance(self.objective, Distillation) and not stored_states
        return 4 * decoder + 2 * encoder, 2 * decoder * teaches

    @property
    def leaves(self) -> list[nn.Module]:
        """The modules whose weights ZeRO-3 gathers and releases as one, in the order of the
        forward.
        """
        below = [self.projection] if self.reads_stack else []
        if isinstance(self.encoder, Encoder):
            below = [self.encoder.embedding, *self.encoder.layers, *below]
        return [*below, self.decoder.embedding, *self.decoder.layers, self.objective]

    def _hidden(self, batch: Batch, *, teaches: bool) -> list[torch.Tensor]:
        """What goes into the LLM: for what learns, be it the stack or the LLM itself, and for the
        teacher.
        """
        if not self.reads_stack:
            hidden_TD = self.decoder.embed(batch.teacher.ids_S)
            # ZeRO-3 gathers a layer for its backward only where a gradient goes through the layer's
            # input.
            return [hidden_TD.requires_grad_(torch.is_grad_enabled() and self.learns)]
        states_UD, parts = self.projection(self.encoder(batch.encoder)), batch.parts
        taught = [batch.teacher.ids_S] * teaches
        if parts is None:
            return [states_UD, *map(self.decoder.embed, taught)]
        # One call for both sides: ZeRO-3 gathers the embeddings once. And one on every rank,
        # whether there is anything between its parts or not.
        embedded = self.decoder.embed(torch.cat([parts.between_Z, *taught]))
        between_ZD, *taught = embedded.split([len(parts.between_Z), *map(len, taught)])
        return [interleave(states_UD, between_ZD, parts), *taught]

    def _split_adapters(self, rank: int) -> None:
        for linear in self.decoder.modules():
            if isinstance(linear, LoraLinear):
                for adapter in linear.student.values():
                    adapter.split(rank)

    def _freeze(self) -> None:
        """All but the fp32 parameters that we made ourselves: the projection's Linear, the
        adapters, a task's head.

        Whoever distils into a head that was copied keeps it as it is.
        """
        trained = ["projection.weight", "projection.bias"]
        trained += ["objective.head.weight"] if not isinstance(self.objective, Distillation) else []
        for name, parameter in self.named_parameters():
            is_adapter = ".student." in name and ".frozen_" not in name
            parameter.requires_grad_(self.learns and (name in trained or is_adapter))
