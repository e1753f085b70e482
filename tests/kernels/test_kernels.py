"""Every implementation in every kernel folder does what its definition says, or refuses the input.

Triton's run for real where there is a GPU, and elsewhere in its interpreter, where bf16 is
truncated when stored.
"""

import dataclasses
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtllm_engine.kernels.agreement import disagreements, random_upstream, run
from mtllm_engine.kernels.attention import attention, grouped, select
from mtllm_engine.kernels.contract import DTYPES, Implementation, Kernel, map_tensors, named_tensors

from mtllm_engine import kernels
from mtllm_engine.spans import build_spans

OPS = kernels.discover()
CUDA = torch.cuda.is_available()
IMPLEMENTATIONS = [
    pytest.param(op, label, id=f"{op}-{label}")
    for op, kernel in OPS.items()
    for label in kernel.implementations
]
OURS = [  # others' kernels take and refuse what their authors chose
    each
    for each in IMPLEMENTATIONS
    if OPS[each.values[0]].implementations[each.values[1]].source in ("triton", "c++")
]
every_implementation = pytest.mark.parametrize(("op", "label"), IMPLEMENTATIONS)


def integers(low: int, high: int, step: int = 1) -> st.SearchStrategy[int]:
    return st.integers(-(-low // step), high // step).map(lambda number: number * step)


def lengths(count: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, high)] * count)


RANDOM_CASES = {  # small: the interpreter takes about 40 us for each operation of each program
    "attention": st.fixed_dictionaries(
        {
            # Where all are 1 the gradients of q and k are exactly 0: no rounding would be allowed
            "lengths": st.integers(1, 5)
            .flatmap(lambda count: lengths(count, 9))
            .filter(lambda each: max(each) > 1),
            "heads": integers(2, 6, 2),
            "kv_heads": st.integers(1, 2),
            "width": integers(8, 64, 8),
            "causal": st.booleans(),
        }
    ),
    "distill_loss": st.integers(1, 3).flatmap(
        lambda count: st.fixed_dictionaries(
            {
                # With fewer channels a norm's gradient is what cancellation leaves of it
                "width": st.integers(4, 90),
                "student": lengths(count, 90),
                "teacher": lengths(count, 90),
                "gap": st.integers(0, 2),
                "aligned": st.booleans(),
                "fp32_weight": st.booleans(),
            }
        )
    ),
    "lora_linear": st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 80),
            "width": st.integers(1, 140),
            "members": st.tuples(st.integers(1, 90), st.integers(1, 90)),
            "adapted": st.sampled_from([(), (0,), (1,), (0, 1)]),
            "rank": st.integers(1, 20),
            "dropout": st.sampled_from([0.0, 0.3]),
            "bias": st.booleans(),
        }
    ),
    "projection": st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 80),
            "width": st.integers(1, 140),
            "out_width": st.integers(1, 90),
            "bias": st.booleans(),
            "grad": st.booleans(),
        }
    ),
    "rms_norm": st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 9),
            "width": st.integers(4, 300),
            "residual": st.booleans(),
            "fp32_weight": st.booleans(),
        }
    ),
    "rope": st.tuples(st.integers(1, 6), st.integers(1, 40)).flatmap(
        lambda sizes: st.fixed_dictionaries(
            {
                "tokens": st.integers(1, 9),
                "heads": st.just(sizes[0]),
                "rotated": st.integers(0, sizes[0]),
                "width": st.just(2 * sizes[1]),
                "pairs": st.none() | st.integers(1, sizes[1]),
            }
        )
    ),
    "swiglu": st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 9),
            "width": st.integers(1, 300),
            "ranks": st.sampled_from([0, 1, 32, 80]),
            "activation": st.sampled_from(["silu", "gelu_tanh"]),
        }
    ),
}
EXTREME_CASES = {  # wider than a block can be: right, or refused by name
    "distill_loss": {"width": 2**15, "student": (2,), "teacher": (1,), "gap": 0, "aligned": False},
    "lora_linear": {
        "tokens": 2, "width": 32, "members": (32,), "adapted": (0,), "rank": 600,
        "dropout": 0.0, "bias": False,
    },
    "projection": {"tokens": 1, "width": 2**17, "out_width": 1, "bias": False, "grad": True},
    "rms_norm": {"tokens": 1, "width": 2**17, "residual": True},
    "rope": {"tokens": 1, "heads": 1, "rotated": 1, "width": 2**13},
    "swiglu": {"tokens": 1, "width": 2**17},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Subject:
    """An implementation that runs here."""

    kernel: Kernel
    implementation: Implementation
    device: str

    @property
    def function(self) -> Callable[..., Any]:
        return self.implementation.function

    @property
    def interpreted(self) -> bool:
        return self.implementation.source == "triton" and not CUDA

    @property
    def cases(self) -> tuple[dict[str, Any], ...]:
        """All on a real device; of them the interpreter does the later, longer ones once."""
        return self.kernel.cases[:3] if self.interpreted else self.kernel.cases

    def inputs(self, dtype: torch.dtype, case: dict[str, Any]) -> dict[str, Any]:
        return self.kernel.inputs(torch.Generator(self.device).manual_seed(0), dtype, **case)

    def disagreements(self, arguments: dict[str, Any], **options: Any) -> list[str]:
        ulps = 2 if self.interpreted else 1
        return disagreements(self.kernel, self.function, arguments, ulps=ulps, **options)


@pytest.fixture
def subject(op: str, label: str) -> Subject:
    kernel = OPS[op]
    implementation = kernel.implementations[label]
    interpreted = implementation.source == "triton" and not CUDA
    if implementation.device == "cuda" and not CUDA and not interpreted:
        pytest.skip(f"{label} needs a CUDA device")
    try:
        implementation.function  # noqa: B018 - imports it
    except ImportError as error:
        pytest.skip(f"{label}: {error}")
    return Subject(kernel, implementation, "cpu" if interpreted else implementation.device)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_definition(subject, dtype):
    if dtype not in subject.implementation.dtypes:
        pytest.skip(f"not made for {dtype}")
    cases = subject.kernel.cases if dtype == torch.float32 else subject.cases
    problems = {str(case): subject.disagreements(subject.inputs(dtype, case)) for case in cases}
    assert not {case: each for case, each in problems.items() if each}


@every_implementation
def test_is_deterministic_and_the_same_without_gradients(subject):
    dtype = subject.implementation.dtypes[-1]
    for case in subject.cases:
        arguments = subject.inputs(dtype, case)
        upstream = random_upstream(subject.kernel.reference, arguments)
        first, second = (run(subject.function, arguments, upstream) for _ in range(2))
        assert_equal(first.outputs, second.outputs)
        assert_equal(first.gradients, second.gradients)
        with torch.no_grad():
            assert_equal(run(subject.function, arguments, {}).outputs, first.outputs)


@every_implementation
@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_agrees_at_random_sizes(subject, data):
    case = data.draw(RANDOM_CASES.get(subject.kernel.name, st.sampled_from(subject.kernel.cases)))
    dtype = data.draw(st.sampled_from(subject.implementation.dtypes))
    assert not subject.disagreements(subject.inputs(dtype, case))


@every_implementation
def test_gradients_come_from_any_output_in_any_layout(subject):
    """As autograd sends them: of one output, expanded from one number, transposed in memory."""
    for case in subject.kernel.cases[:2]:
        arguments = subject.inputs(subject.implementation.dtypes[0], case)
        for name, gradient in random_upstream(subject.kernel.reference, arguments).items():
            transposed = gradient.t().contiguous().t() if gradient.dim() == 2 else gradient
            for layout in (gradient, gradient.flatten()[0].expand_as(gradient), transposed):
                assert not subject.disagreements(arguments, upstream={name: layout})


@every_implementation
def test_whatever_needs_no_gradient_gets_none(subject):
    for case in subject.kernel.cases[:2]:
        arguments = subject.inputs(subject.implementation.dtypes[0], case)
        upstream = random_upstream(subject.kernel.reference, arguments)
        complete = run(subject.function, arguments, upstream)
        for name, tensor in named_tensors(arguments).items():
            if tensor.requires_grad:
                frozen = replaced(arguments, name, tensor.detach())
                left = random_upstream(subject.kernel.reference, frozen)
                partial = run(subject.function, frozen, {key: upstream[key] for key in left})
                assert name not in partial.gradients
                assert_equal(partial.outputs, complete.outputs)
                if left.keys() == upstream.keys():
                    same = {key: complete.gradients[key] for key in partial.gradients}
                    assert_equal(partial.gradients, same)


@every_implementation
def test_frozen_weights_may_move_before_backward(subject):
    """As ZeRO-3 does, which releases a parameter's storage after forward and gathers it again.

    What is saved must be that parameter, for a view would keep the old storage alive, and here
    reads NaN from it.
    """
    for case in subject.kernel.cases[:2]:
        arguments = subject.inputs(subject.implementation.dtypes[0], case)
        upstream = random_upstream(subject.kernel.reference, arguments)
        expected = run(subject.function, arguments, upstream).gradients

        def forward_then_move(**arguments: Any) -> Any:
            outputs = subject.function(**arguments)
            for tensor in named_tensors(arguments).values():
                if tensor.is_floating_point() and not tensor.requires_grad:
                    old, tensor.data = tensor.data, tensor.data.clone()
                    old.fill_(float("nan"))
            return outputs

        assert_equal(run(forward_then_move, arguments, upstream).gradients, expected)


@pytest.mark.parametrize(
    ("op", "label"), [each for each in OURS if each.values[0] == "distill_loss"]
)
def test_each_moment_is_right(subject):
    """Among numbers of very different size the largest must not excuse the others."""
    for case in subject.cases:
        arguments = subject.inputs(torch.bfloat16, case)
        ours, theirs = (
            run(each, arguments, {}).outputs
            for each in (subject.function, subject.kernel.reference)
        )
        torch.testing.assert_close(ours["moments"][:4], theirs["moments"][:4], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("op", "label"), [each for each in OURS if each.values[0] == "rms_norm"])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_with_a_weight_in_fp32_rounds_once(subject, residual):
    """As Gemma, whose weight is 1 + what is stored: in half precision it would lose that."""
    case = {"tokens": 12, "width": 160, "residual": residual, "fp32_weight": True}
    arguments = subject.inputs(torch.float16, case)
    y_SD, hidden_SD = subject.function(**arguments)
    hidden64_SD = hidden_SD.double()
    scale_S1 = (hidden64_SD.square().mean(-1, keepdim=True) + arguments["eps"]).rsqrt()
    exact_SD = hidden64_SD * scale_S1 * arguments["weight_D"].double()
    half_unit = torch.finfo(torch.float16).eps / 2
    assert ((y_SD - exact_SD).abs() <= 1.001 * half_unit * exact_SD.abs() + 1e-7).all()


@pytest.mark.parametrize(("op", "label"), [each for each in OURS if each.values[0] == "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_does_not_turn_stays_bit_for_bit(subject, dtype):
    case = {"tokens": 5, "heads": 5, "rotated": 3, "width": 20, "pairs": 3}
    arguments = subject.inputs(dtype, case)
    upstream = random_upstream(subject.kernel.reference, arguments)
    outputs, gradients = run(subject.function, arguments, upstream)
    forward = outputs[""], arguments["heads_SXK"]
    backward = gradients["heads_SXK"], upstream[""]
    for ours, theirs in (forward, backward):
        assert torch.equal(ours[:, 3:], theirs[:, 3:])
        assert torch.equal(ours[:, :3, 6:], theirs[:, :3, 6:])
        assert not torch.isclose(ours[:, :3, :6], theirs[:, :3, :6]).all(dim=-1).any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's
@pytest.mark.parametrize(("op", "label"), [each for each in OURS if each.values[0] == "swiglu"])
def test_gelu_of_large_numbers_and_what_is_no_activation(subject):
    """A cube of them would be infinite, and infinity times 0 is NaN; a NaN stays."""
    large = [1e30, -1e30, 3e38, -3e38, 30.0, -30.0, float("nan")]
    gate_S = torch.tensor(large, device=subject.device)
    gate_up_S2 = torch.stack([gate_S, torch.ones_like(gate_S)], dim=1).requires_grad_()
    y_S1 = subject.function(gate_up_S2, "gelu_tanh")
    y_S1.sum().backward()
    assert torch.equal(y_S1[:-1, 0], gate_S[:-1].clamp(min=0))
    assert gate_up_S2.grad[:-1, 0].tolist() == [1.0, 0.0] * 3
    assert y_S1[-1].isnan() and gate_up_S2.grad[-1].isnan().all()
    with pytest.raises(ValueError, match="activation is 'relu'; choose one of silu, gelu_tanh"):
        subject.function(gate_up_S2, "relu")


@pytest.mark.parametrize(("op", "label"), OURS)
def test_extreme_widths_are_right_or_refused(subject):
    arguments = subject.inputs(
        torch.float32, EXTREME_CASES.get(subject.kernel.name) or subject.kernel.cases[0]
    )
    try:
        assert not subject.disagreements(arguments)
    except ValueError as error:
        assert any(name in str(error) for name in arguments)


@pytest.mark.parametrize(("op", "label"), OURS)
def test_no_tokens_are_no_error(subject):
    case = subject.kernel.cases[1]
    if "tokens" in case:
        assert not subject.disagreements(subject.inputs(torch.float32, case | {"tokens": 0}))


@pytest.mark.parametrize(("op", "label"), OURS)
def test_bad_arguments_are_refused_by_name_before_any_launch(subject, monkeypatch):
    arguments = subject.inputs(torch.float32, subject.kernel.cases[1])
    forbid_launches(monkeypatch)
    for what, path, bad in bad_arguments(arguments):
        with pytest.raises(ValueError) as error:
            subject.function(**bad)
        names = arguments if what in ("shape", "device") else [path.split(".")[0]]
        assert any(name in str(error.value) for name in names), (what, path, str(error.value))


def bad_arguments(arguments: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what is wrong, where, arguments) with one tensor spoiled each time.

    Spans come from `build_spans`, so only their device can be wrong.
    """
    tensors = named_tensors(map_tensors(torch.Tensor.detach, arguments))
    for path, tensor in tensors.items():
        spoiled = {"device": tensor.to("meta")} if len(tensors) > 1 else {}
        if "spans" not in path:
            spoiled["dtype"] = tensor.double() if tensor.is_floating_point() else tensor.long()
            spoiled["shape"] = torch.cat([tensor, tensor[..., :1]], dim=-1)
            spoiled["contiguity"] = torch.stack([tensor, tensor], dim=-1)[..., 0]
        for what, bad in spoiled.items():
            yield what, path, replaced(arguments, path, bad)


def replaced(arguments: dict[str, Any], path: str, tensor: torch.Tensor) -> dict[str, Any]:
    target = named_tensors(arguments)[path]
    return map_tensors(lambda x: tensor if x is target else x, arguments)


def forbid_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In so far as there is a Triton to launch anything."""
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    def launch(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was launched on bad arguments")

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_first_importable_implementation_runs_and_the_label_says_why():
    def kernel(*implementations: Implementation) -> Kernel:
        labelled = {f"number {number}": each for number, each in enumerate(implementations)}
        return dataclasses.replace(OPS["swiglu"], implementations=labelled)

    missing = Implementation("cpu", "package", "swiglu.reference:swiglu", package="no_such_package")
    untried = Implementation("cpu", "torch", "swiglu.reference:swiglu", has_run=False)
    elsewhere = Implementation("cuda", "torch", "swiglu.reference:swiglu")
    assert kernel(elsewhere).label("cpu") == "reference"
    assert kernel(elsewhere).label("cuda") == "number 0"
    why = "no number 0: No module named 'no_such_package'"
    assert kernel(missing).label("cpu") == f"reference ({why})"
    label = f"number 2 ({why}; not yet run by its authors)"
    assert kernel(missing, elsewhere, untried).label("cpu") == label
    gate_up_SF = torch.randn(3, 8)
    assert torch.equal(kernel(missing, untried)(gate_up_SF), OPS["swiglu"].reference(gate_up_SF))


@pytest.mark.parametrize(
    ("backend", "device", "label"),
    [
        ("auto", "cpu", "torch SDPA"),
        ("auto", "cuda", "torch varlen_attn, FlashAttention 2"),
        ("torch", "cpu", "torch SDPA"),
        ("reference", "cpu", "reference"),
        ("reference", "cuda", "reference"),
    ],
)
def test_attention_backends(backend, device, label):
    selected = select(backend, device).label(device)
    assert selected.removesuffix(" (not yet run by its authors)") == label


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("torch", "cpu", "torch SDPA cannot do: set model.attention to 'reference'$"),
        ("torch", "cuda", "varlen_attn, .* cannot do: set .* to 'reference' or 'flash_attn' or"),
    ],
)
def test_attention_without_a_soft_cap_is_refused_to_models_that_have_one(backend, device, message):
    with pytest.raises(ValueError, match=f"model.decoder caps its attention's scores, .*{message}"):
        select(backend, device, softcap=50.0)
    for able in ("reference", "auto"):  # where flash-attn is not installed
        assert select(able, device, softcap=50.0).label(device) == "reference"


@pytest.mark.parametrize("causal", [False, True])
def test_soft_cap_is_its_formula(causal):
    """Entry by entry, and its gradients by finite differences; 1.5 bends most scores."""
    case = {"lengths": (3, 1, 4), "heads": 4, "kv_heads": 2, "width": 3, "causal": causal}
    arguments = attention.inputs(torch.Generator().manual_seed(0), torch.float32, **case)
    states = [arguments.pop(name).detach().double() for name in ("q_SHK", "k_SGK", "v_SGK")]
    q_SHK, k_SGK, v_SGK = (2 * x for x in states)
    ours_SHK = attention.reference(q_SHK, k_SGK, v_SGK, **arguments, softcap=1.5)
    bounds = [(0, 3)] * 3 + [(3, 4)] + [(4, 8)] * 4
    for token, head in itertools.product(range(8), range(4)):
        start, end = bounds[token]
        seen = slice(start, token + 1 if causal else end)
        scores = k_SGK[seen, head // 2] @ q_SHK[token, head] / 3**0.5
        weights = torch.exp(1.5 * torch.tanh(scores / 1.5))
        expected_K = weights @ v_SGK[seen, head // 2] / weights.sum()
        torch.testing.assert_close(ours_SHK[token, head], expected_K)
    plain_SHK = attention.reference(q_SHK, k_SGK, v_SGK, **arguments)
    assert (ours_SHK - plain_SHK).abs().max() > 0.1

    def capped(*states: torch.Tensor) -> torch.Tensor:
        return attention.reference(*states, **arguments, softcap=1.5)

    assert torch.autograd.gradcheck(capped, [x.requires_grad_() for x in (q_SHK, k_SGK, v_SGK)])


@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_flash_attn_is_told_of_a_soft_cap_if_there_is_one(softcap, monkeypatch):
    """Versions before 2.6 have no word for it."""
    called = {}
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda q_SHK, *_, **options: called.update(options) or q_SHK
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    kernel = select("flash_attn", "cuda", softcap)
    inputs = attention.inputs(torch.Generator(), torch.bfloat16, **attention.cases[1])
    flash_attn = kernel.implementations["flash-attn"].function
    flash_attn(**inputs, **({"softcap": softcap} if softcap else {}))
    expected = {"causal": True, "deterministic": False}
    assert called == (expected | {"softcap": softcap} if softcap else expected)


@pytest.fixture
def flash_attn_4(monkeypatch) -> list[dict]:
    """What a stand-in for flash-attn-4, which returns as that does, was called with."""
    called = []

    def flash_attn_varlen_func(q, k, v, **options):
        called.append({"q": q, "k": k, "v": v, **options})
        return q.clone(), None

    parent, package = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    for module in (parent, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return called


@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_flash_attn_4_gets_packs_by_its_own_words(softcap, flash_attn_4):
    kernel = select("flash_attn_4", "cuda", softcap)
    inputs = attention.inputs(torch.Generator(), torch.bfloat16, **attention.cases[1])
    function = kernel.implementations["flash-attn-4"].function
    out_SHK = function(**inputs, **({"softcap": softcap} if softcap else {}))
    (call,) = flash_attn_4
    assert call["q"] is inputs["q_SHK"] and out_SHK.shape == inputs["q_SHK"].shape
    assert call["cu_seqlens_q"] is call["cu_seqlens_k"] is inputs["cu_seqlens"]
    assert call["max_seqlen_q"] == call["max_seqlen_k"] == max(inputs["lengths"])
    assert (call["causal"], call["softcap"], call["deterministic"]) == (True, softcap, False)


def test_flash_attn_4_alone_is_not_flash_attn(flash_attn_4):
    """Both packages are called flash_attn. Capped scores are for the one that is there."""
    with pytest.raises(ValueError, match="flash_attn_interface.*pip install flash-attn on a CUDA"):
        select("flash_attn", "cuda")
    assert list(select("auto", "cuda", 50.0).implementations) == ["flash-attn-4"]


def test_flash_attn_4_is_for_later_gpus(flash_attn_4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"'flash_attn_4': it is not for Card; .*\[flash4\]"):
        select("flash_attn_4", "cuda")
    assert not select("auto", "cuda", 50.0).implementations


@pytest.mark.parametrize("is_grouped", [False, True])
def test_varlen_attn_is_told_of_grouped_queries_where_it_can_be(is_grouped):
    """torch 2.11 takes them as they are, and has no word for it."""
    q_SHK, k_SGK = torch.empty(3, 4, 8), torch.empty(3, 2 if is_grouped else 4, 8)
    options = grouped(lambda query, key, *, enable_gqa=False: None, q_SHK, k_SGK)
    assert options == {"enable_gqa": is_grouped}
    assert grouped(lambda query, key: None, q_SHK, k_SGK) == {}


def test_attention_backends_agree():
    generator = torch.Generator().manual_seed(0)
    arguments = attention.inputs(generator, torch.float32, **attention.cases[0])
    (_, q_SHK), *rest = arguments.items()
    expected_SHK = attention.reference(**arguments)
    for backend in ("auto", "torch", "reference"):
        torch.testing.assert_close(select(backend, "cpu")(q_SHK, **dict(rest)), expected_SHK)


def test_attention_on_a_cpu_keeps_its_output_once():
    """The tensor that the next linear keeps, q, k, v, and one number a token and head.

    However many runs there are.
    """
    case = {"lengths": (3, 5, 5, 2), "heads": 4, "kv_heads": 2, "width": 8, "causal": False}
    arguments = attention.inputs(torch.Generator().manual_seed(0), torch.float32, **case)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out_SHK = attention.implementations["torch SDPA"].function(**arguments)
    tensors = [out_SHK, *(arguments[name] for name in ("q_SHK", "k_SGK", "v_SGK"))]
    assert {x.data_ptr() for x in tensors} <= kept.keys()
    assert sum(kept.values()) == sum(x.nbytes for x in tensors) + out_SHK.nbytes // 8


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        (
            "flash",
            "cuda",
            "unknown model.attention: 'flash'; choose one of auto, torch, cudnn, flash",
        ),
        ("flash_attn", "cpu", "model.attention = 'flash_attn': it is not for cpu"),
        ("cudnn", "cpu", "model.attention = 'cudnn': it is not for cpu; set it to 'auto'"),
    ],
)
def test_attention_backend_that_cannot_be(backend, device, message):
    with pytest.raises(ValueError, match=message):
        select(backend, device)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([], "there is none"),
        ([(0, 3), (3, 3)], r"number 1, \[3, 3\) of 9 tokens, is empty"),
        ([(0, 3), (5, 4)], "number 1, .* is empty"),
        ([(0, 3), (2, 4)], "number 1, .* starts before the one before it ends"),
        ([(4, 6), (0, 2)], "number 1, .* starts before the one before it ends"),
        ([(-1, 3)], "number 0, .* is out of range"),
        ([(0, 3), (5, 10)], "number 1, .* is out of range"),
    ],
)
def test_bad_spans_are_refused(bounds, message):
    with pytest.raises(ValueError, match=f"spans: {message}"):
        build_spans(bounds, 9, "cpu")
