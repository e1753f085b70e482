"""What of attention's implementations can be seen without their GPU.

cuDNN's operators get stand-ins on the CPU, of torch's own signature and through its dispatcher: the
definition, and what they are called with.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtllm_engine.kernels.agreement import disagreements
from mtllm_engine.kernels.attention import attention, measured, mixed, select
from mtllm_engine.kernels.attention import library as attentions
from torch.torch_version import TorchVersion

from benchmarks import attention as ranks

CUDNN = "mtllm_engine.kernels.attention.cudnn"


@pytest.fixture
def cudnn(monkeypatch) -> Iterator:
    """Its module, as with a torch that is late enough."""
    if torch.cuda.is_available():
        pytest.skip("the operators themselves are there")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.0"))
    monkeypatch.delitem(sys.modules, CUDNN, raising=False)
    yield importlib.import_module(CUDNN)
    del sys.modules[CUDNN]


@pytest.fixture
def calls(cudnn) -> Iterator[list[dict]]:
    """What cuDNN's operators were called with, by the names of their own schemas."""
    made: list[dict] = []
    library = torch.library.Library("aten", "IMPL")
    for stand_in in (_cudnn_attention_forward, _cudnn_attention_backward):
        operator = getattr(torch.ops.aten, stand_in.__name__).default
        names = [argument.name for argument in operator._schema.arguments]

        def called(*values, stand_in=stand_in, names=names, scale=None):
            made.append(dict(zip(names, values)))  # trailing defaults are left out
            return stand_in(**made[-1])

        library.impl(stand_in.__name__, called, "CPU")
    yield made
    library._destroy()


def _cudnn_attention_forward(query, key, value, cum_seq_q, max_q, is_causal=False, **others):
    out_SHK = _defined(query, key, value, cum_seq_q, is_causal)
    sums_HS = torch.full(query.shape[:2][::-1], 7.0)
    seed, nothing = torch.tensor(3), torch.empty(0)
    return out_SHK, sums_HS, cum_seq_q, cum_seq_q, max_q, max_q, seed, seed + 1, nothing


def _cudnn_attention_backward(grad_out, query, key, value, cum_seq_q, is_causal=False, **others):
    def gradients():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out_SHK = _defined(*leaves, cum_seq_q, is_causal)
        return torch.autograd.grad(out_SHK, leaves, grad_out)

    with ThreadPoolExecutor(1) as apart:  # this one is below autograd, where none is recorded
        return apart.submit(gradients).result()


def _defined(q_SHK, k_SGK, v_SGK, cu_seqlens, causal):
    bounds = {"cu_seqlens": cu_seqlens, "lengths": tuple(cu_seqlens.diff().tolist())}
    return attention.reference(q_SHK, k_SGK, v_SGK, **bounds, causal=causal)


def _inputs(dtype=torch.bfloat16, **changes):
    case = {"lengths": (3, 1), "heads": 4, "kv_heads": 2, "width": 8, "causal": True} | changes
    return attention.inputs(torch.Generator().manual_seed(0), dtype, **case)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5)
    .filter(lambda each: max(each) > 1)
    .map(tuple),
    group=st.integers(1, 2),
    causal=st.booleans(),
    dtype=st.sampled_from(attentions.HALVES),
)
def test_cudnn_is_one_node_that_agrees(calls, cudnn, lengths, group, causal, dtype):
    calls.clear()
    heads = {"heads": 2 * group, "kv_heads": 2, "lengths": lengths, "causal": causal}
    arguments = _inputs(dtype, **heads)
    assert not disagreements(attention, cudnn.attention_cudnn, arguments)
    out_SHK = cudnn.attention_cudnn(**arguments)
    inner = {edge[0].name() for edge in out_SHK.grad_fn.next_functions if edge[0] is not None}
    assert inner == {"torch::autograd::AccumulateGrad"}


def test_what_cudnn_is_told(calls, cudnn):
    """Bounds in int32, the longest document, no bias, dropout or mask; the gradient in one piece,
    and all that the forward has left for its backward."""
    arguments = _inputs()
    out_SHK = cudnn.attention_cudnn(**arguments)
    out_SHK.backward(torch.ones(()).to(out_SHK.dtype).expand_as(out_SHK))
    forward, backward = calls
    for call in calls:
        assert call["cum_seq_q"].dtype == torch.int32
        assert call["cum_seq_q"] is call["cum_seq_k"] or call["cum_seq_q"].equal(call["cum_seq_k"])
        assert (call["max_q"], call["max_k"], call["is_causal"]) == (3, 3, True)
        assert call["attn_bias"] is None and call["dropout_p"] == 0.0
    assert forward["compute_log_sumexp"] and not forward.get("return_debug_mask")
    assert backward["grad_out"].is_contiguous() and (backward["logsumexp"] == 7).all()
    assert (backward["philox_seed"], backward["philox_offset"]) == (3, 4)
    assert backward["out"].equal(out_SHK)


def test_documents_of_one_token_are_not_said_to_be(calls, cudnn):
    cudnn.attention_cudnn(**_inputs(lengths=(1, 1)))
    assert calls[0]["max_q"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "q_SHK is torch.float32, .* model.dtype"),
        ({"width": 12}, "q_SHK has heads of 12, .* multiples of 8 up to 128: set model.attention"),
        ({"width": 256}, "q_SHK has heads of 256"),
    ],
)
def test_cudnn_refuses_by_name(calls, cudnn, changes, message):
    with pytest.raises(ValueError, match=message):
        cudnn.attention_cudnn(**_inputs(**changes))
    assert not calls


def test_cudnn_of_an_early_torch_is_refused_with_the_fix(monkeypatch):
    monkeypatch.delitem(sys.modules, CUDNN, raising=False)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.1"))
    with pytest.raises(ImportError, match=r"torch 2.13.1 .* pip install 'torch>=2.14'"):
        importlib.import_module(CUDNN)


def test_auto_takes_what_was_measured_on_this_gpu_at_this_width(tmp_path, monkeypatch):
    """As far as it can be had here: cuDNN's can not."""
    rows = [
        {"device": device, "width": width, "ms": ms}
        for device, width, ms in (
            ("Card", 64, {"torch cuDNN": 2.0, "flash-attn": 3.0}),
            ("Card", 128, {"torch varlen_attn, FlashAttention 2": 1.0, "torch cuDNN": 2.0}),
            ("Other", 96, {"flash-attn": 1.0}),
        )
    ]
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.FILE.write_text(json.dumps(rows))
    measured.read.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    package = type(sys)("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    try:
        chosen = {width: select("auto", "cuda", width=width) for width in (64, 96, 128)}
    finally:
        measured.read.cache_clear()
    labels = {width: next(iter(kernel.implementations)) for width, kernel in chosen.items()}
    default = "torch varlen_attn, FlashAttention 2"
    assert labels == {64: "flash-attn", 96: default, 128: default}
    assert "not yet run" in chosen[64].label("cuda")


def test_the_committed_table_names_what_there_is():
    for row in measured.read():
        assert row.keys() == {"device", "width", "torch", "commit", "ms"}
        assert row["ms"].keys() <= attention.implementations.keys()


@pytest.mark.parametrize("version", ["2.11.0", "2.14.0"])
def test_varlen_attn_is_kept_to_flash_attention(monkeypatch, version):
    """Where torch would choose, cuDNN is off while it is called, and on again afterwards."""
    enabled = []

    def varlen_attn(query, *_, window_size):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    attentions.attention_varlen(**_inputs())
    assert enabled == [before and version == "2.11.0"]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize(("median", "least"), [(350, 300), (40, 30)])
def test_mixed_lengths_are_a_full_pack_around_their_median(median, least):
    lengths = mixed(median)
    middle = sorted(lengths)[len(lengths) // 2]
    assert 16384 - 512 < sum(lengths) <= 16384 and max(lengths) <= 512
    assert least <= middle <= median + 5 and len(set(lengths)) > 10


def test_the_table_is_made_of_a_benchmarks_rows(tmp_path, monkeypatch, capsys):
    """Of what agreed everywhere; new lengths count for a layer's share; other devices stay."""
    flash, cudnn = "torch varlen_attn, FlashAttention 2", "torch cuDNN"

    def rows(provider, width, lengths, first_ms, *median_ms):
        about = {"op": "attention", "device": "Card", "driver": "1", "torch": "2.14"}
        about |= {"commit": "c", "shape": {"width": width, "lengths": lengths}}
        if not median_ms:
            return [about | {"provider": provider, "status": "ArithmeticError: off"}]
        passes = zip(("forward", "backward"), median_ms)
        return [
            about
            | {"provider": provider, "status": "ok", "pass": name}
            | {"median_ms": ms, "first_ms": first_ms}
            for name, ms in passes
        ]

    made = [
        *rows(flash, 128, [512], 3.2, 1.0, 2.0),
        *rows(flash, 128, [40], 3.2, 1.0, 1.0),
        *rows(cudnn, 128, [512], 32.0, 0.5, 1.0),
        *rows(cudnn, 128, [40], 32.0, 0.5, 0.5),
        *rows("eager", 128, [40], 32.0, 0.1, 0.1),
        *rows(flash, 64, [512], 0.0, 1.0, 1.0),
        *rows(flash, 64, [40], 0.0, 1.0, 1.0),
        *rows(cudnn, 64, [512], 0.0, 0.1, 0.1),
        *rows(cudnn, 64, [40], 0.0),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    before = [{"device": name, "width": 64, "ms": {"old": 1.0}} for name in ("Other", "Card")]
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.FILE.write_text(json.dumps(before))
    measured.read.cache_clear()
    try:
        assert ranks.main([str(tmp_path / "rows.jsonl")]) == 0
    finally:
        measured.read.cache_clear()
    table = {
        (row["device"], row["width"]): row["ms"] for row in json.loads(measured.FILE.read_text())
    }
    assert table == {
        ("Card", 64): {flash: 4.0},
        ("Card", 128): {flash: 5.2, cudnn: 4.5},
        ("Other", 64): {"old": 1.0},
    }
    assert f"Card, heads of 128: {cudnn}, {flash}" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text(json.dumps(made[0] | {"driver": None}) + "\n")
    assert ranks.main([str(tmp_path / "rows.jsonl")]) == 1
