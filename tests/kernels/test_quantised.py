"""Frozen weights in 8 and 4 bits: products as the formats define them, and a step on them."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mtllm_engine.kernels.lora_linear import Dropout, check_available, fused, library, quantise
from mtllm_engine.kernels.lora_linear.quantised import BYTES, Fp8, quantise_rows
from mtllm_engine.kernels.lora_linear.reference import lora_linear as reference

from mtllm_engine.data.batch import collate
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.training import engine as engines
from mtllm_engine.training.checkpoint import identity
from mtllm_engine.training.engine import build_engine, shard
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, build_world

KINDS = ("fp8", "nf4")
NEEDS = {"nf4": "bitsandbytes"}
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8_DTYPES = [torch.bfloat16] if DEVICE == "cuda" else list(EPS)  # of products


def held(weight_FD: torch.Tensor, kind: str):
    need(kind, weight_FD.device.type)
    return quantise(weight_FD, kind)


def need(kind: str, device: str = "cpu"):
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    if kind != "none":
        try:
            check_available(kind, torch.device(device), torch.bfloat16)
        except ValueError as error:
            pytest.skip(str(error))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, as activations and gradients have."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2.0 ** torch.randint(-12, 6, (shape[0], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


def e4m3_rows(x: torch.Tensor) -> torch.Tensor:
    """Each row rounded to e4m3 under the least power of two that keeps it below 448; fp64."""
    rows = []
    for row in x.double():
        largest = row.abs().max().item()
        scale = 2.0 ** math.ceil(math.log2(largest / 448)) if largest else 1.0
        rows.append((row / scale).float().to(torch.float8_e4m3fn).double() * scale)
    return torch.stack(rows)


def nf4_values(weight) -> torch.Tensor:
    """NF4 decoded by its definition: a code's value times its block's scale.

    The latter is 8 bits times another scale.
    """
    state, outer = weight.state, weight.state.state2
    packed = weight.codes.flatten().int()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.shape.numel()]
    blocks = torch.arange(len(state.absmax))
    scales = outer.code[state.absmax.int()] * outer.absmax[blocks // outer.blocksize] + state.offset
    table = importlib.import_module("bitsandbytes").functional.get_4bit_type("nf4", device="cpu")
    values = table[codes] * scales[torch.arange(len(codes)) // state.blocksize]
    return values.view(weight.shape)


def assert_product(
    found: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, eps=2.0**-24
):
    """found = left right up to K roundings of sums, by default fp32, and one to the dtype."""
    expected, size = left @ right, left.abs() @ right.abs()
    bound = left.shape[1] * eps * size + EPS[dtype] * expected.abs() + 1e-30
    assert found.dtype == dtype and ((found.double() - expected).abs() <= bound).all()


@given(st.integers(1, 9), st.integers(1, 80), st.sampled_from(list(EPS)), st.integers(0, 10**6))
def test_rows_are_scaled_by_powers_of_two_and_rounded_once(
    tokens: int, width: int, dtype: torch.dtype, seed: int
):
    x_SD = randn(tokens, width, seed=seed, dtype=dtype)
    x_SD[seed % tokens] *= seed % 3  # zeros in a third of the cases
    quantised_SD, scale_S = quantise_rows(x_SD)
    powers_S = scale_S.log2()
    assert (powers_S == powers_S.round()).all() and quantised_SD.dtype == torch.float8_e4m3fn
    assert torch.equal(quantised_SD.double() * scale_S[:, None], e4m3_rows(x_SD))
    largest_S = quantised_SD.double().abs().amax(1)
    assert ((largest_S == 0) | ((largest_S > 223) & (largest_S <= 448))).all()


@settings(max_examples=12)
@given(
    st.integers(1, 4),
    st.integers(1, 5000),
    st.sampled_from(list(EPS)),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_triton_rounds_rows_to_the_same_bits(
    tokens: int, width: int, dtype: torch.dtype, scaled: bool, seed: int
):
    triton_rows = pytest.importorskip("mtllm_engine.kernels.lora_linear.rows").quantise_rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_SD = randn(tokens, width, seed=seed, dtype=dtype).to(device)
    generator = torch.Generator().manual_seed(seed)
    x_SD *= 2.0 ** torch.randint(-20, 1, x_SD.shape, generator=generator).to(device, dtype)
    x_SD[0, seed % width] = (0.0, float("nan"), 1e30)[seed % 3]
    column_D = 2.0 ** torch.randint(-9, 9, (width,)).float().to(device) if scaled else None
    ours_SD, ours_S = triton_rows(x_SD, column_D)
    theirs_SD, theirs_S = quantise_rows(x_SD, column_D)
    finite_S = x_SD.isfinite().all(1)
    assert torch.equal(ours_SD.view(torch.uint8)[finite_S], theirs_SD.view(torch.uint8)[finite_S])
    assert torch.equal(ours_S[finite_S], theirs_S[finite_S])
    assert ((ours_SD.float() * ours_S[:, None]).isnan().any(1) == ~finite_S).all()


def test_triton_rounds_as_the_format_says():
    triton_rows = pytest.importorskip("mtllm_engine.kernels.lora_linear.rows").quantise_rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    between = torch.cat([codes, middles, codes * 1.0001, codes * 0.9999]).clamp_(max=447)
    between = torch.cat([between, -between])[None].to(device)
    ours_SD, scale_S = triton_rows(between)
    expected_SD = between.to(torch.float8_e4m3fn).view(torch.uint8)
    assert scale_S.item() == 1 and torch.equal(ours_SD.view(torch.uint8), expected_SD)


@pytest.mark.parametrize("mantissa", [1.0, 1.7499999, 1.75, 1.7500001, 1.9999999])
def test_the_largest_value_of_a_row_stays_finite(mantissa: float):
    power_S = 2.0 ** torch.tensor([-90.0, 0.0, 60.0])
    quantised_SD, scale_S = quantise_rows(mantissa * power_S[:, None])
    values_S = quantised_SD.double()[:, 0] * scale_S
    assert (values_S / power_S - mantissa).abs().max() <= 2.0**-4


@settings(max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(FP8_DTYPES),
    st.integers(0, 10**6),
)
def test_fp8_products_are_those_of_rounded_factors(
    tokens: int, d: int, f: int, dtype: torch.dtype, seed: int
):
    need("fp8", DEVICE)
    width, out_width = 16 * d, 16 * f
    weight_FD = randn(out_width, width, seed=seed, dtype=dtype)
    x_SD, dy_SF = (
        randn(tokens, size, seed=seed + size, dtype=dtype) for size in (width, out_width)
    )
    weight, rounded_FD = Fp8.quantise(weight_FD.to(DEVICE)), e4m3_rows(weight_FD)
    # Hopper's units align the terms of an fp8 sum to 14 bits
    eps = 2.0**-13 if DEVICE == "cuda" else 2.0**-24
    assert_product(weight.product(x_SD.to(DEVICE)).cpu(), e4m3_rows(x_SD), rounded_FD.T, dtype, eps)
    # The sum runs over the weight's rows: their scales are in dy before it is rounded, and not in
    # the other factor
    scale_F = weight.scale_F.cpu()
    scaled_SF = e4m3_rows(dy_SF.double() * scale_F)
    gradient_SD = weight.input_gradient(dy_SF.to(DEVICE)).cpu()
    assert_product(gradient_SD, scaled_SF, rounded_FD / scale_F[:, None], dtype, eps)


@settings(max_examples=20)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 70),
    st.sampled_from(list(EPS)),
    st.integers(0, 10**6),
)
def test_nf4_products_are_those_of_decoded_weights(
    tokens: int, width: int, out_width: int, dtype, seed: int
):
    weight = held(randn(out_width, width, seed=seed, dtype=dtype), "nf4")
    x_SD, dy_SF = (
        randn(tokens, size, seed=seed + size, dtype=dtype) for size in (width, out_width)
    )
    decoded_FD = nf4_values(weight)
    full_FD = weight.full().double()
    assert (full_FD - decoded_FD).abs().max() <= 2 * EPS[dtype] * decoded_FD.abs().max()
    assert_product(weight.product(x_SD), x_SD.double(), full_FD.T, dtype)
    assert_product(weight.input_gradient(dy_SF), dy_SF.double(), full_FD, dtype)


@settings(max_examples=20)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 120),
    st.sampled_from(KINDS),
    st.sampled_from(FP8_DTYPES),
    st.integers(0, 10**6),
)
def test_a_payload_is_all_that_a_weight_has(
    tokens: int, width: int, out_width: int, kind: str, dtype: torch.dtype, seed: int
):
    """It may go, and come again elsewhere, as ZeRO-3 moves it; products have the same bits."""
    need(kind, DEVICE)
    step = 16 if kind == "fp8" else 1
    width, out_width = -(-width // step) * step, -(-out_width // step) * step
    full_FD = randn(out_width, width, seed=seed, dtype=dtype).to(DEVICE)
    x_SD, dy_SF = (
        randn(tokens, size, seed=seed + size, dtype=dtype).to(DEVICE) for size in (width, out_width)
    )
    whole, sharded = held(full_FD, kind), quantise(full_FD, kind, sharded=True)
    payload = sharded.payload
    assert payload.dtype == torch.uint8 and payload.dim() == 1 and not payload.requires_grad
    expected = [whole.product(x_SD), whole.input_gradient(dy_SF)]
    content = payload.detach().clone()
    payload.data.fill_(255)
    payload.data = content
    found = [sharded.product(x_SD), sharded.input_gradient(dy_SF)]
    assert all(map(torch.equal, found, expected))
    blocks = -(-full_FD.numel() // 64)
    scales = 4 * out_width if kind == "fp8" else blocks + 4 * (-(-blocks // 256) + 1)
    assert len(payload) == -(-full_FD.numel() // (1 if kind == "fp8" else 2)) + scales
    assert sharded.num_bytes - sharded.other_bytes == len(payload) < whole.num_bytes


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.04), ("nf4", 0.12)])
def test_normal_weights_lose_what_the_format_loses(kind: str, most: float):
    weight_FD = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    weight = held(weight_FD, kind)
    kept_FD = nf4_values(weight) if kind == "nf4" else e4m3_rows(weight_FD)
    assert 0.2 * most < (kept_FD - weight_FD).norm() / weight_FD.norm() < most
    assert weight.num_bytes <= (0.6 if kind == "nf4" else 2.1) * weight_FD.numel()
    # The rest: a table, and scales of rows
    assert abs(weight.num_bytes / weight_FD.numel() - BYTES[kind]) < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", [library.lora_linear, fused.lora_linear])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_add_to_a_quantised_weight_what_they_add_to_a_full_one(
    kind: str, implementation, p: float
):
    if (kind, DEVICE) == ("fp8", "cuda"):
        pytest.skip("there fp8 multiplies into bf16 alone, whose rounding hides what is compared")
    width, members, tokens, rank = 48, (32, 16), 21, 4
    weight_FD = randn(sum(members), width, seed=1).to(DEVICE)
    weight, bias_F = held(weight_FD, kind), randn(sum(members), 1, seed=2)[:, 0].to(DEVICE)
    seeds_S = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    dropout = Dropout(p=p, seeds_S=seeds_S, linears=(3, 4)) if p else None
    upstream_SF = torch.randn(tokens, sum(members), generator=torch.Generator().manual_seed(3))
    start_SD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(4))
    upstream_SF, start_SD = upstream_SF.to(DEVICE), start_SD.to(DEVICE)

    def run(function, frozen, adapted: bool):
        x_SD = start_SD.clone().requires_grad_()
        shapes = [shape for f in members for shape in ((rank, width), (f, rank))]
        matrices = [randn(*shape, seed=5).to(DEVICE).requires_grad_() for shape in shapes]
        adapters = ((0, *matrices[:2]), (members[0], *matrices[2:])) if adapted else ()
        y_SF = function(x_SD, frozen, bias_F, adapters, 2.0, dropout if adapted else None)
        (y_SF * upstream_SF).sum().backward()
        return [y_SF.detach(), x_SD.grad, *(matrix.grad for matrix in matrices)]

    for adapted in (False, True):
        found, wanted = run(implementation, weight, adapted), run(reference, weight_FD, adapted)
        wanted[0] = wanted[0] - start_SD @ weight_FD.T + weight.product(start_SD)
        wanted[1] = wanted[1] - upstream_SF @ weight_FD + weight.input_gradient(upstream_SF)
        for ours, theirs in zip(found, wanted):
            if ours is not None or theirs is not None:
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_no_full_weight(kind: str):
    weight = held(randn(320, 64, seed=0), kind)
    x_SD, saved = randn(3, 64, seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y_SF = library.lora_linear(x_SD, weight, None)
    assert not saved
    y_SF.sum().backward()
    assert x_SD.grad.isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder", width=64, layers=3)
    build_corpus(folder / "train", 60)
    return folder


def step(folder: Path, base: str, *, dense: bool = False):
    """Loss and gradients of a step on a stack.

    Args:
        dense: On full weights that hold what the quantised ones mean.
    """
    need(base)
    config = build_config(folder, model={"quantization": base}, zero={"stage": 0})
    world = build_world()
    stack, weights = build_stack(config)
    shard(stack, weights, config, world)
    if dense:
        for layer in stack.decoder.layers:
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                full_FD = linear.weight.full()
                del linear.weight, linear.payload
                linear.weight = torch.nn.Parameter(full_FD, requires_grad=False)
    engine = build_engine(config, stack, world)
    stream = build_stream(config.data, build_tokenizer(config, stack), world, seed=0)
    global_batch = agree(stream, world, config.memory.max_tokens)
    stream.close()
    loss = 0.0
    for documents in global_batch.micro_batches:
        share = engine(collate(documents, step_seed=1, device=world.device), global_batch.totals)
        engine.backward(share.loss)
        loss += share.loss.item()
    trained = {name: item for name, item in stack.named_parameters() if item.requires_grad}
    gradients = {name: item.grad.clone() for name, item in trained.items()}
    before = {name: item.detach().clone() for name, item in trained.items()}
    engine.step(1e-3)
    moved = [name for name, item in trained.items() if not torch.equal(item, before[name])]
    assert set(moved) >= {name for name in trained if gradients[name].any()}
    return stack, loss, gradients


def relative(found: dict, wanted: dict) -> float:
    error = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    size = torch.cat([each.flatten() for each in wanted.values()])
    return (error.norm() / size.norm()).item()


def test_a_step_on_nf4_is_the_step_on_the_weights_that_it_stands_for(folder: Path):
    stack, loss, gradients = step(folder, "nf4")
    _, expected, wanted = step(folder, "nf4", dense=True)
    assert abs(loss / expected - 1) < 1e-5 and relative(gradients, wanted) < 1e-5
    held_bytes = sum(weight.num_bytes for weight in quantised_weights(stack))
    count = sum(weight.shape.numel() for weight in quantised_weights(stack))
    assert len(quantised_weights(stack)) == 12
    assert held_bytes <= 0.6 * count + 12 * 1024  # a table for each of so few


@pytest.mark.parametrize(
    ("base", "loss_error", "gradient_error"), [("fp8", 0.05, 0.15), ("nf4", 0.2, 0.5)]
)
def test_a_step_on_a_quantised_base_is_near_the_step_on_the_full_one(
    folder: Path, base: str, loss_error: float, gradient_error: float
):
    _, loss, gradients = step(folder, base)
    _, expected, wanted = step(folder, "none")
    assert abs(loss / expected - 1) < loss_error
    assert 1e-4 < relative(gradients, wanted) < gradient_error


def test_at_most_one_layer_is_full_while_a_base_is_read(folder: Path, monkeypatch):
    need("fp8")
    config = build_config(folder, model={"quantization": "fp8"}, zero={"stage": 0})
    stack, weights = build_stack(config)
    full, quantise_leaf = [], engines._quantise

    def counting(leaf, *rest):
        items = stack.decoder.layers.parameters()
        matrices = [item for item in items if item.dim() == 2 and not item.requires_grad]
        full.append(sum(not item.is_meta for item in matrices))
        quantise_leaf(leaf, *rest)

    monkeypatch.setattr(engines, "_quantise", counting)
    shard(stack, weights, config, build_world())
    assert max(full) == 4 and len(quantised_weights(stack)) == 12
    assert not any(item.is_meta for item in stack.parameters())


def test_a_run_keeps_its_base(folder: Path):
    full, fp8 = (
        identity(build_config(folder, model={"quantization": base}, zero={"stage": 0}))
        for base in ("none", "fp8")
    )
    assert full.keys() == fp8.keys()
    assert [key for key in full if full[key] != fp8[key]] == ["model.quantization"]


def unable(*factors: torch.Tensor, **options: object) -> None:
    raise RuntimeError("_scaled_mm only supports per-tensor scaling for CPU backend")


def test_what_cannot_be_is_told_in_one_line(folder: Path, monkeypatch):
    with pytest.raises(ValueError, match="model.quantization must be one of 'none', 'fp8', 'nf4'"):
        build_config(folder, model={"quantization": "int8"}, zero={"stage": 0})
    message = "model.quantization='fp8': a linear of 24 x 40 weights, not multiples of 16"
    with pytest.raises(ValueError, match=message):
        quantise(torch.randn(24, 40), "fp8")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    message = r"model.quantization='fp8': A100 \(sm_80\) has no fp8 units; .*.quantization='none'"
    with pytest.raises(ValueError, match=message):
        check_available("fp8", gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_available("fp8", gpu, torch.bfloat16)
    with pytest.raises(ValueError, match="set model.dtype='bfloat16'"):
        check_available("fp8", gpu, torch.float32)
    monkeypatch.setattr(torch, "_scaled_mm", unable)
    message = "model.quantization='fp8': torch .* cannot scale rows apart .*; install torch 2.13"
    with pytest.raises(ValueError, match=message):
        check_available("fp8", torch.device("cpu"), torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"needs bitsandbytes .* pip install 'mtllm-engine\[quantised\]'"
    with pytest.raises(ValueError, match=message):
        check_available("nf4", torch.device("cpu"), torch.float32)
