"""Checkpoints' parts of random values, as PEFT and our runs save them; and whole runs of them."""

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaModel, M2M100Config, PreTrainedModel

from mtllm_engine import config as configs
from mtllm_engine import files
from mtllm_engine.config import LORA_TARGETS, Config
from mtllm_engine.model.build import load_config
from mtllm_engine.training.checkpoint import IDENTITY, fingerprint_of


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


def make_adapters(model: PreTrainedModel, folder: Path, *, seed: int = 0, **keys: Any) -> Path:
    """Adapters that PEFT made on a model, which they change. Args: keys: of PEFT's LoraConfig."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def write_projection(
    folder: Path, width: int, encoder_width: int, *, seed: int = 0, bias: bool = True
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (width, encoder_width), "bias": (width,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors if bias else {"weight": tensors["weight"]}, folder / "projection.safetensors")


def write_head(folder: Path, outputs: int, width: int, *, seed: int | None = None) -> None:
    """Args: seed: of random values; None: ones."""
    shape, generator = (outputs, width), torch.Generator().manual_seed(seed or 0)
    weight = torch.ones(shape) if seed is None else torch.randn(shape, generator=generator)
    save_file({"head.weight": weight}, folder / "head.safetensors")


def write_run(config: Config, *, outputs: int = 0, seed: int = 0) -> Path:
    """A run as if it had been trained. Args: outputs: of its head, if it has one.

    Returns:
        Its one checkpoint.
    """
    run, model, lora = Path(config.run.dir), config.model, config.lora
    folder = run / "checkpoints" / "step-00000001"
    llm = LlamaModel.from_pretrained(model.decoder)
    keys = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
    keys |= {"target_modules": list(lora.target_modules), "base_model_name_or_path": model.decoder}
    write_adapters(folder, llm, seed=seed, **keys)
    flat = configs.flatten(config)
    identity = {key: flat[key] for key in flat if key.startswith(IDENTITY)}
    identity["model.decoder"] = fingerprint_of(model.decoder)
    width = llm.config.hidden_size
    if config.objective.reader == "stack":
        encoder = load_config(Path(model.encoder), M2M100Config, "model.encoder")
        bias = model.projection_bias
        write_projection(folder, width, encoder.d_model, seed=seed, bias=bias)
        identity["model.encoder"] = fingerprint_of(model.encoder)
    if outputs:
        write_head(folder, outputs, width, seed=seed)
    (run / "config.toml").write_text(configs.dumps(config))
    seal(folder, {"step": 1, "score": None, "identity": identity})
    files.link(run / "checkpoints" / "latest", folder.name)
    return folder


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Writes a checkpoint's record, with the hashes of the files that are there."""
    paths = [*folder.glob("*.safetensors"), folder / "adapter_config.json"]
    hashes = {path.name: files.sha256_of(path) for path in paths}
    (folder / "state.json").write_bytes(files.sealed(record | {"files": hashes}))
