"""The memory estimate: it counts what a stack holds and a layer saves; every preset fits its GPU.

`PYTHONPATH=. python tests/training/test_memory.py` writes the presets' estimates anew.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mtllm_engine.kernels.contract import Kernel
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING

from benchmarks.models import DECODERS, ENCODERS
from mtllm_engine.config import LoraConfig, load
from mtllm_engine.model import activations as layer_activations
from mtllm_engine.model.build import build_stack, read_models
from mtllm_engine.model.decoder import DecoderLayer, TokenStream
from mtllm_engine.model.families import decoder_spec
from mtllm_engine.training.engine import shard
from mtllm_engine.training.memory import ASSUMED, estimate, saved_bytes, total
from tests.support.machine import ROOT
from tests.support.tiny import build_config, build_decoder, build_encoder, build_world

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.toml"))
HANDBOOK = (ROOT / "configs" / "README.md").read_text()
NAME = re.compile(r"(llama3_\w+)_(\d+)x(\d+)gb")
ESTIMATE = re.compile(r"# memory of a GPU.*\n(?:#  .*\n)+")


def comment(path: Path) -> tuple[str, float, int]:
    """The lines that a preset carries, its total and its GPU's size in GB."""
    decoder, world_size, size = NAME.fullmatch(path.stem).groups()
    spec = decoder_spec(DECODERS[decoder])
    rows = estimate(load(path), ENCODERS["nllb600m"], spec, int(world_size))
    lines = [f"#   {row.name:<22}{row.bytes / 1e9:7.2f}  {row.how}\n" for row in rows]
    lines.append(f"#   {'total':<22}{total(rows) / 1e9:7.2f}  of {size}; logits: none\n")
    title = "# memory of a GPU, GB, as mtllm_engine/training/memory.py estimates it:\n"
    return title + "".join(lines), total(rows) / 1e9, int(size)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_gpu_and_says_how(path: Path):
    lines, total_gb, size_gb = comment(path)
    text = path.read_text()
    assert text.startswith(("# planned: not measured on such a device\n", "# measured on "))
    assert ESTIMATE.search(text).group() == lines, "run tests/training/test_memory.py"
    assert total_gb < size_gb
    (row,) = (line for line in HANDBOOK.splitlines() if f"`{path.name}`" in line)
    assert f"| {total_gb:.0f} GB |" in row
    config = load(path)
    share = -(-config.data.lanes // int(NAME.fullmatch(path.stem)[2])) * config.data.pack_tokens
    assert config.memory.max_tokens <= share  # more would be room for tokens that no step has


def test_presets_are_there():
    assert len(PRESETS) == 6


class Attention(torch.autograd.Function):
    """Keeps what FlashAttention keeps: q, k, v, what comes out, and the softmax's sums."""

    @staticmethod
    def forward(ctx, q_SHK, k_SGK, v_SGK):
        context_SHK = q_SHK.contiguous() + 1
        sums_SH = q_SHK.new_empty(q_SHK.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_SHK, k_SGK, v_SGK, context_SHK, sums_SH)
        return context_SHK

    @staticmethod
    def backward(ctx, dcontext_SHK):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("family", "rank", "dropout", "recompute"),
    [
        ("llama", 4, 0.1, "cheap"),
        ("llama", 20, 0.0, "cheap"),
        ("llama", 4, 0.1, "mlp"),
        ("qwen3", 4, 0.1, "cheap"),
        ("gemma3_text", 4, 0.1, "mlp"),
        ("olmo2", 4, 0.1, "cheap"),
        ("phi3", 4, 0.1, "cheap"),
        ("granite", 4, 0.1, "cheap"),
    ],
)
def test_a_layer_saves_what_the_estimate_says(
    monkeypatch, family: str, rank: int, dropout: float, recompute: str
):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("counted in Triton's interpreter")
    monkeypatch.setattr(
        Kernel,
        "__call__",
        lambda kernel, *given, **named: kernel._choice("cuda")[1](*given, **named),
    )
    tokens, lora = 24, LoraConfig(rank=rank, dropout=dropout)
    sizes = DECODERS["tiny"].to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    kind = CONFIG_MAPPING[family]
    spec = decoder_spec(kind(**{name: sizes[name] for name in names}, head_dim=64))
    lora = replace(lora, target_modules=spec.targets)
    attention = lambda q, k, v, **packing: Attention.apply(q, k, v)  # noqa: E731
    options = {"layer": 0, "causal": False, "recompute": recompute}
    layer = DecoderLayer(spec, {"student": lora}, torch.float32, attention, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(".student." in name)
    angles_Sk = torch.zeros(tokens, spec.head_width // 2)
    seeds_S = torch.zeros(tokens, dtype=torch.int32)
    packed = SimpleNamespace(seeds_S=seeds_S, cu_seqlens=None, lengths=(tokens,))
    turns = ((angles_Sk, angles_Sk),) * len(spec.ropes)
    stream = TokenStream(tokens=packed, turns=turns, adapters="student", grad=True)
    # Weights, and what is there once for all layers.
    others = (*layer.parameters(), angles_Sk, seeds_S)
    mine = {item.untyped_storage().data_ptr() for item in others}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            saved[storage.data_ptr()] = storage
        return tensor

    class Seen(saved_tensors_hooks):
        """What a hook of the layer's own leaves to be kept."""

        def __init__(self, pack, unpack) -> None:
            super().__init__(
                lambda x: keep(kept) if isinstance(kept := pack(x), torch.Tensor) else kept, unpack
            )

    monkeypatch.setattr(layer_activations, "saved_tensors_hooks", Seen)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        (out_SD,) = layer(torch.randn(tokens, spec.width, requires_grad=True), streams=[stream])
    assert out_SD.requires_grad
    assert sum(storage.nbytes() for storage in saved.values()) == tokens * saved_bytes(
        spec, lora, torch.float32, recompute
    )


@pytest.mark.parametrize("quantization", ["none", "fp8", "nf4"])
def test_weights_are_counted_as_a_stack_holds_them(tmp_path: Path, quantization: str):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    build_encoder(tmp_path / "encoder")
    build_decoder(tmp_path / "decoder", width=128)
    config = build_config(tmp_path, model={"quantization": quantization}, zero={"stage": 0})
    stack, weights = build_stack(config)
    shard(stack, weights, config, build_world())
    trained = sum(item.numel() for item in stack.parameters() if item.requires_grad)
    named = stack.named_parameters()
    others = [item for name, item in named if not name.endswith(".payload")]
    frozen = sum(item.nbytes for item in others if not item.requires_grad)
    linears = [
        linear.weight
        for layer in stack.decoder.layers
        for linear in layer.children()
        if hasattr(linear, "members")
    ]
    encoder, decoder = read_models(config.model)
    rows = {row.name: row.bytes for row in estimate(config, encoder, decoder, 1)}
    assert rows["trained"] == 16 * trained and rows["assumed"] == ASSUMED
    if quantization == "none":
        assert rows["LLM's linears"] + rows["other frozen weights"] == frozen
    else:
        assert rows["other frozen weights"] == frozen
        tables = 1024 * len(linears) + 4 * sum(weight.shape[0] for weight in linears)
        assert 0 <= sum(weight.num_bytes for weight in linears) - rows["LLM's linears"] <= tables


if __name__ == "__main__":
    for preset in PRESETS:
        preset.write_text(
            ESTIMATE.sub(lambda _, preset=preset: comment(preset)[0], preset.read_text())
        )
        print(preset, f"{comment(preset)[1]:.1f} GB", file=sys.stderr)
