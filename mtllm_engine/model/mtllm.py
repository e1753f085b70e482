"""The stack: MT encoder -> projection -> LLM with adapters, and the same LLM without them as its teacher."""

import torch
from torch import nn
from transformers import LlamaConfig, M2M100Config

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Batch
from mtllm_engine.kernels.attention import select
from mtllm_engine.kernels.projection import projection
from mtllm_engine.model.decoder import Decoder
from mtllm_engine.model.encoder import Encoder
from mtllm_engine.objective import Objective, Share
from mtllm_engine.world import device_type

LAYER_NORM_EPS = 1e-5  # PyTorch's default, which M2M-100 uses


class Projection(nn.Module):
    """The encoder's final LayerNorm (frozen) and the trained Linear(E -> D), fp32 parameters."""

    def __init__(self, in_width: int, out_width: int, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.empty(in_width, dtype=dtype))
        self.norm_bias = nn.Parameter(torch.empty(in_width, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if bias else None

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        return projection(hidden_SE, self.norm_weight, self.norm_bias, LAYER_NORM_EPS, self.weight, self.bias)


class Stack(nn.Module):
    """The one root module: a single forward runs encoder, student, teacher and loss.

    A second engine call per micro-batch would invalidate ZeRO-3's prefetch trace every time.
    """

    def __init__(self, config: Config, encoder: M2M100Config, decoder: LlamaConfig) -> None:
        super().__init__()
        dtype = getattr(torch, config.model.dtype)
        self.attention = select(config.model.attention, device_type())
        self.encoder = Encoder(encoder, dtype, self.attention)
        self.projection = Projection(encoder.d_model, decoder.hidden_size, dtype, bias=config.model.projection_bias)
        self.decoder = Decoder(
            decoder,
            config.lora,
            dtype,
            self.attention,
            causal=config.model.causal,
            recompute=config.memory.activations == "recompute",
        )
        self.objective = Objective(decoder.hidden_size, decoder.rms_norm_eps, dtype)
        self._freeze()

    def forward(self, batch: Batch, global_spans: int) -> Share:
        """The micro-batch's share of the loss; `global_spans` counts the spans of all ranks' micro-batches."""
        student_SD = self.projection(self.encoder(batch.student))
        teacher_TD = self.decoder.embedding(batch.teacher.ids_S)
        student_SD, teacher_TD = self.decoder(
            (student_SD, teacher_TD),
            (
                self.decoder.stream(batch.student, adapted=True, grad=True),
                self.decoder.stream(batch.teacher, adapted=False, grad=False),
            ),
        )
        return self.objective(student_SD, teacher_TD, batch, global_spans)

    @property
    def leaves(self) -> list[nn.Module]:
        """The modules whose weights ZeRO-3 gathers and releases as one, in the order of the forward."""
        return [
            self.encoder.embedding,
            *self.encoder.layers,
            self.projection,
            self.decoder.embedding,
            *self.decoder.layers,
            self.objective,
        ]

    def _freeze(self) -> None:
        """All but the projection's Linear and the adapters: those are the fp32 parameters that we made ourselves."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in ("projection.weight", "projection.bias") or ".student." in name)
