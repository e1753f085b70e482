"""The memory estimate: it counts what a stack holds and a layer saves, and grows as it must."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mtllm_engine.kernels.contract import Kernel
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING

from benchmarks.models import DECODERS
from mtllm_engine.config import LoraConfig
from mtllm_engine.data.batch import Document, Totals, collate
from mtllm_engine.model import activations as layer_activations
from mtllm_engine.model.build import build_stack, read_models
from mtllm_engine.model.decoder import DecoderLayer, TokenStream
from mtllm_engine.model.families import decoder_spec
from mtllm_engine.training.engine import shard
from mtllm_engine.training.memory import ASSUMED, estimate, saved_bytes
from tests.support.machine import need_fp8
from tests.support.tiny import build_config, build_decoder, build_encoder, build_world


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


def seen_by(keep: Callable[[torch.Tensor], torch.Tensor]) -> type[saved_tensors_hooks]:
    """What hooks of the layers' own leave to be kept."""

    class Seen(saved_tensors_hooks):
        def __init__(self, pack, unpack) -> None:
            super().__init__(
                lambda x: keep(kept) if isinstance(kept := pack(x), torch.Tensor) else kept, unpack
            )

    return Seen


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
    options = {"layer": 0, "causal": False, "recompute": recompute, "defers": False}
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

    monkeypatch.setattr(layer_activations, "saved_tensors_hooks", seen_by(keep))
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
    if quantization == "fp8":
        need_fp8()
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


def test_a_stack_saves_what_the_estimate_says(tmp_path: Path, monkeypatch):
    """Of all layers, of what is below them and of the loss, by the CUDA implementations."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("counted in Triton's interpreter")
    choose = lambda kernel, *given, **named: kernel._choice("cuda")[1](*given, **named)  # noqa: E731
    monkeypatch.setattr(Kernel, "__call__", choose)
    build_encoder(tmp_path / "encoder")
    build_decoder(tmp_path / "decoder", layers=4)
    config = build_config(tmp_path, data={"lanes": 1, "pack_documents": 1}, zero={"stage": 0})
    stack, weights = build_stack(config)
    shard(stack, weights, config, build_world())
    attention = lambda q, k, v, **packing: Attention.apply(q, k, v)  # noqa: E731
    for layer in (*stack.encoder.layers, *stack.decoder.layers):
        layer.attention = attention
    ids = np.arange(32, dtype=np.int32)
    document = Document(key="0", seed=0, student_ids_S=ids, teacher_ids_T=ids)
    batch = collate([document] * 2, step_seed=0, device=torch.device("cpu"))
    known = {item.untyped_storage().data_ptr() for item in stack.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    monkeypatch.setattr(layer_activations, "saved_tensors_hooks", seen_by(keep))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        share = stack(batch, Totals(2, 2))
    assert share.loss.requires_grad
    encoder, decoder = read_models(config.model)
    rows = {row.name: row.bytes for row in estimate(config, encoder, decoder, 1)}
    assert sum(saved.values()) == pytest.approx(rows["saved activations"], rel=0.05)
