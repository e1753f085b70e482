"""The frozen MT encoder (M2M-100 / NLLB) on packed tokens. Source: arXiv 2010.11125, 2207.04672."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import M2M100Config

from mtllm_engine.data.batch import Tokens
from mtllm_engine.kernels.contract import Kernel

ACTIVATIONS = {"relu": torch.relu_, "gelu": functional.gelu}


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, with biases."""

    def __init__(self, config: M2M100Config, dtype: torch.dtype, attention: Kernel) -> None:
        super().__init__()
        width, options = config.d_model, {"dtype": dtype}
        self.attention = attention
        self.num_heads = config.encoder_attention_heads
        self.activation = ACTIVATIONS[config.activation_function]
        self.attention_norm = nn.LayerNorm(width, **options)
        self.qkv = nn.Linear(width, 3 * width, **options)
        self.out = nn.Linear(width, width, **options)
        self.feed_forward_norm = nn.LayerNorm(width, **options)
        self.up = nn.Linear(width, config.encoder_ffn_dim, **options)
        self.down = nn.Linear(config.encoder_ffn_dim, width, **options)

    def forward(self, hidden_SE: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        qkv_S3HK = self.qkv(self.attention_norm(hidden_SE)).unflatten(-1, (3, self.num_heads, -1))
        q_SHK, k_SHK, v_SHK = qkv_S3HK.unbind(1)
        packing = {"cu_seqlens": tokens.cu_seqlens, "lengths": tokens.lengths}
        context_SHK = self.attention(q_SHK, k_SHK, v_SHK, **packing, causal=False)
        # Nothing is kept for a backward, so sums are made in place.
        hidden_SE = self.out(context_SHK.flatten(1)).add_(hidden_SE)
        inner_SF = self.activation(self.up(self.feed_forward_norm(hidden_SE)))
        return self.down(inner_SF).add_(hidden_SE)


class Encoder(nn.Module):
    """Token ids to states before the final LayerNorm, which belongs to the projection. Never gets a
    gradient.
    """

    def __init__(self, config: M2M100Config, dtype: torch.dtype, attention: Kernel) -> None:
        super().__init__()
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.first_position = config.pad_token_id + 1  # fairseq's numbering
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, dtype=dtype)
        self.layers = nn.ModuleList(
            EncoderLayer(config, dtype, attention) for _ in range(config.encoder_layers)
        )

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> torch.Tensor:
        hidden_SE = self.embedding(tokens.ids_S) * self.scale
        positions_SE = sinusoids(tokens.positions_S + self.first_position, hidden_SE.shape[-1])
        hidden_SE = hidden_SE + positions_SE.to(hidden_SE.dtype)
        for layer in self.layers:
            hidden_SE = layer(hidden_SE, tokens)
        return hidden_SE


def sinusoids(positions_S: torch.Tensor, width: int) -> torch.Tensor:
    """fairseq's sinusoidal position embeddings, fp32 (S, width): all sines, then all cosines."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions_S.device)
    frequencies = torch.exp(exponents * -(math.log(10000) / (half - 1)))
    angles = positions_S.float()[:, None] * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
