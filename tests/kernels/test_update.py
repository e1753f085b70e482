"""What adapters add to a linear's output: packed for the kernels, or left to SwiGLU to add."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mtllm_engine.kernels.agreement import disagreements, poisoned_memory
from mtllm_engine.kernels.contract import Kernel
from mtllm_engine.kernels.lora_linear import library, lora_linear, quantise
from mtllm_engine.kernels.swiglu import swiglu

pytest.importorskip("triton")
from mtllm_engine.kernels.lora_linear import fused, low_rank
from mtllm_engine.kernels.swiglu.fused import swiglu as fused_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def joined(activation: str = "silu", **linear) -> torch.Tensor:
    gate_up_SF, update = fused.lora_linear(**linear, deferred=True)
    assert (update is None) == (not linear["adapters"])
    return fused_swiglu(gate_up_SF, activation, update)


def apart(activation: str = "silu", **linear) -> torch.Tensor:
    return swiglu.reference(lora_linear.reference(**linear), activation)


def inputs(generator: torch.Generator, dtype: torch.dtype, *, activation: str, **case) -> dict:
    return {"activation": activation, **lora_linear.inputs(generator, dtype, **case)}


BOTH = Kernel(
    name="both", reference=apart, inputs=inputs, cases=(), shapes=(), cost=lora_linear.cost
)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 70),
    inner=st.integers(1, 90),
    adapted=st.sampled_from([(), (0,), (1,), (0, 1)]),
    rank=st.integers(1, 20),
    dropout=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
def test_an_update_left_to_swiglu_agrees_with_the_definitions(inner, **case):
    """In fp32: in half precision each op is held to its own definition."""
    case["members"] = (inner, inner)
    arguments = inputs(torch.Generator(DEVICE).manual_seed(0), torch.float32, **case)
    assert not disagreements(BOTH, joined, arguments)


def test_an_update_of_a_quantised_linear_is_left_too():
    pytest.importorskip("bitsandbytes")
    linear = inputs_of_a_layer()
    linear["weight_FD"] = quantise(linear["weight_FD"], "nf4")
    y_SF, (low_SQ, lora_B_FQ) = fused.lora_linear(**linear, deferred=True)
    assert torch.equal(y_SF, linear["weight_FD"].product(linear["x_SD"]))
    summed_SF = y_SF + low_SQ @ lora_B_FQ.T
    torch.testing.assert_close(summed_SF, fused.lora_linear(**linear), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [library.lora_linear, lora_linear.reference])
def test_where_no_update_is_left_nothing_is_to_be_added(implementation):
    linear = inputs_of_a_layer()
    y_SF, update = implementation(**linear, deferred=True)
    assert update is None and torch.equal(y_SF, implementation(**linear))


def test_ranks_beyond_the_kernels_leave_no_update():
    linear = inputs_of_a_layer(rank=low_rank.MAX_RANK + 1)
    y_SF, update = fused.lora_linear(**linear, deferred=True)
    assert update is None and torch.equal(y_SF, fused.lora_linear(**linear))


def inputs_of_a_layer(rank: int = 4) -> dict:
    case = {"tokens": 5, "width": 64, "members": (48, 48), "adapted": (0, 1), "rank": rank}
    generator = torch.Generator(DEVICE).manual_seed(0)
    return lora_linear.inputs(generator, torch.float32, **case, dropout=0.0, bias=False)


def test_an_update_of_another_shape_is_refused_by_name():
    gate_up_SF = torch.zeros(6, 8, device=DEVICE)
    low_SQ, lora_B_FQ = torch.zeros(6, 4, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
    for update, name in (
        ((low_SQ[:5], lora_B_FQ), r"update\[0\]"),
        ((low_SQ, lora_B_FQ[:, :3].contiguous()), r"update\[1\]"),
        ((low_SQ, lora_B_FQ.half()), r"update\[1\]"),
        ((low_SQ.t().contiguous().t(), lora_B_FQ), r"update\[0\] is not contiguous"),
    ):
        with pytest.raises(ValueError, match=name):
            fused_swiglu(gate_up_SF, "silu", update)


@settings(max_examples=12)
@given(data=st.data())
def test_adapters_are_packed_bit_for_bit(data):
    """In fp32 and fp16; bf16 the interpreter rounds in a way of its own."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    gaps = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=5))
    widths = [data.draw(st.integers(1, 300)) for _ in gaps[1:]]
    rank, width = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 300))
    starts, end = [], 0
    for gap, each in zip(gaps, widths):
        starts.append(end + gap)
        end = starts[-1] + each
    out_width, scale = end + gaps[-1], 0.3
    ends = tuple(start + each for start, each in zip(starts, widths))
    group = low_rank.Group(tuple(starts), ends, rank)
    generator = torch.Generator(DEVICE).manual_seed(0)
    matrices = [
        torch.randn(*shape, generator=generator, device=DEVICE)
        for each in widths
        for shape in ((rank, width), (each, rank))
    ]
    with poisoned_memory():
        lora_A_QD, lora_B_FQ = low_rank.pack(group, out_width, scale, matrices, dtype)
    padded = group.padded_rank
    expected_A, expected_B = torch.zeros_like(lora_A_QD), torch.zeros_like(lora_B_FQ)
    for i, (start, end) in enumerate(zip(group.starts, group.ends)):
        ranks = slice(i * padded, i * padded + rank)
        expected_A[ranks] = matrices[2 * i]
        expected_B[start:end, ranks] = (matrices[2 * i + 1] * scale).to(dtype)
    assert torch.equal(lora_A_QD, expected_A)
    assert torch.equal(lora_B_FQ, expected_B)
