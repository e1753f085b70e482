"""Checkpoints' parts of random values, as PEFT and our runs save them."""

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaModel

from mtllm_engine.config import LORA_TARGETS


def write_adapters(
    folder: Path, llm: LlamaModel, *, seed: int = 0, dtype: torch.dtype = torch.float32, **keys
) -> Path:
    """Adapters of an LLM. Args: keys: of PEFT's LoraConfig; all linears unless they say others."""
    config = peft.LoraConfig(**{"target_modules": list(LORA_TARGETS)} | keys)
    config.save_pretrained(folder)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, linear in llm.named_modules():
        if isinstance(linear, nn.Linear) and name.rpartition(".")[2] in config.target_modules:
            prefix = f"base_model.model.{name}"
            sizes = {"A": (config.r, linear.in_features), "B": (linear.out_features, config.r)}
            for matrix, size in sizes.items():
                value = 0.2 * torch.randn(size, generator=generator) / size[1] ** 0.5
                tensors[f"{prefix}.lora_{matrix}.weight"] = value.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_projection(folder: Path, width: int, encoder_width: int, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (width, encoder_width), "bias": (width,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "projection.safetensors")


def write_head(folder: Path, outputs: int, width: int) -> None:
    save_file({"head.weight": torch.ones(outputs, width)}, folder / "head.safetensors")
