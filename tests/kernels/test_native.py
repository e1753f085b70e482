"""csrc/ is built once, anywhere a compiler is; where none is, the reason takes one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mtllm_engine.kernels.agreement import random_upstream, run
from mtllm_engine.kernels.contract import named_tensors

from mtllm_engine import kernels
from mtllm_engine.kernels import native
from tests.support.machine import ROOT, threads

BUILD = "from mtllm_engine.kernels import native; native.load('cpu'); print(native.build('cpu'))"
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler"
)


def start(**environment: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", BUILD], env=variables, **pipes)


@needs_compiler
def test_processes_that_start_together_build_once(tmp_path: Path):
    compiler = tmp_path / "compiler"
    count = f'[ "$1" = --version ] || echo >> {tmp_path}/builds'
    compiler.write_text(f'#!/bin/sh\n{count}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    processes = [start(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    outputs = {process.communicate()[0].strip() for process in processes}
    (library,) = outputs
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "\n"
    assert sorted(path.suffix for path in (tmp_path / "mtllm").iterdir()) == ["", ".lock", ".so"]
    assert Path(library).parent == tmp_path / "mtllm"


@needs_compiler
def test_cache_that_cannot_be_written(tmp_path: Path):
    """A home that is none, as on some clusters' nodes."""
    (tmp_path / "file").touch()
    process = start(XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    library, errors = process.communicate()
    assert process.returncode == 0, errors
    assert Path(library.strip()).parent == tmp_path / f"mtllm-{os.getuid()}"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no compiler"),
        ("exit 3", "compiler fails: exit status 3"),
        (
            "echo warning: w >&2; echo 'ops.cpp:2: error: e' >&2; exit 1",
            "compiler fails: ops.cpp:2: error: e",
        ),
    ],
)
def test_without_a_compiler_that_works(script, reason, tmp_path: Path, monkeypatch):
    if script:
        (tmp_path / "compiler").write_text(f"#!/bin/sh\n[ $1 = --version ] || {{ {script}; }}\n")
        (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", "compiler")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ImportError, match=reason) as error:
        native.build("cpu")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("mtllm/*.so"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_cuda_ops_compile_and_link():
    assert native.build("cuda").stat().st_size


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_ops_do_not_load_into_a_torch_without_cuda():
    message = "there is no nvcc|nvcc is of CUDA .*, torch of CUDA None"
    with pytest.raises(ImportError, match=message):
        native.load("cuda")


THREADED_CASES = {  # each of several threads' work
    "distill_loss": {
        "width": 512,
        "student": (3, 700, 64, 65) * 9,
        "teacher": (1, 90, 130, 2) * 9,
        "gap": 1,
        "aligned": True,
    },
    "rms_norm": {"tokens": 700, "width": 513, "residual": True},
    "rope": {"tokens": 700, "heads": 8, "rotated": 6, "width": 66},
    "swiglu": {"tokens": 700, "width": 259},
}
KEPT_BYTES = {  # for backward, of fp32: what the caller does not have anyway
    "rms_norm": lambda case: 4 * case["tokens"],  # 1 / rms
    "rope": lambda case: 0,
    "swiglu": lambda case: 0,
}


@needs_compiler
@pytest.mark.parametrize("op", THREADED_CASES)
def test_results_do_not_depend_on_the_number_of_threads(op):
    kernel = kernels.discover()[op]
    function = kernel.implementations["c++"].function
    arguments = kernel.inputs(torch.Generator().manual_seed(0), torch.float32, **THREADED_CASES[op])
    upstream = random_upstream(function, {name: _copy(x) for name, x in arguments.items()})

    def results(count: int) -> list[torch.Tensor]:
        with threads(count):
            result = run(function, arguments, upstream)
        return [*result.outputs.values(), *result.gradients.values()]

    one, five = results(1), results(5)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@needs_compiler
@pytest.mark.parametrize("op", KEPT_BYTES)
def test_nothing_is_kept_that_the_caller_has_not(op):
    kernel, case = kernels.discover()[op], THREADED_CASES[op]
    arguments = kernel.inputs(torch.Generator().manual_seed(0), torch.float32, **case)
    arguments = {name: _copy(x) for name, x in arguments.items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = kernel.implementations["c++"].function(**arguments)
    known = [*named_tensors(arguments).values(), *named_tensors(outputs).values()]
    if op == "rms_norm":
        del known[-2]  # the normed states
    pointers = {x.data_ptr() for x in known}
    assert kept
    assert sum(x.nbytes for x in kept if x.data_ptr() not in pointers) == KEPT_BYTES[op](case)


def _copy(argument: Any) -> Any:
    """For ops that work in place."""
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


@needs_compiler
def test_activations_are_exact_to_a_few_units_in_the_last_place():
    swiglu = kernels.discover()["swiglu"].implementations["c++"].function
    special_S = torch.tensor([0.0, -1e-30, 1e30, float("inf")])
    gate_S = torch.cat([torch.linspace(-87, 100, 400_001), special_S])
    ours_S = swiglu(torch.stack([gate_S, torch.ones_like(gate_S)], dim=1))[:, 0]
    exact_S = torch.nn.functional.silu(gate_S.double())
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours_S.double(), exact_S, rtol=4 * eps, atol=0.0)
    # gelu: the sigmoid's argument, up to 20 here, is rounded before the exponential
    gate_S = torch.linspace(-5, 5, 100_001)
    ours_S = swiglu(torch.stack([gate_S, torch.ones_like(gate_S)], dim=1), "gelu_tanh")[:, 0]
    x_S = gate_S.double()
    argument_S = 2 * (2 / torch.pi) ** 0.5 * (x_S + 0.044715 * x_S**3)
    exact_S = x_S * argument_S.sigmoid()
    allowed_S = 2 * eps * (1 + argument_S.abs()) * exact_S.abs()
    assert ((ours_S.double() - exact_S).abs() <= allowed_S).all()
    beyond_S2 = torch.tensor([[-200.0, 1.0], [-1e30, 1.0], [float("nan"), 1.0]])
    ours = swiglu(beyond_S2).flatten().tolist()
    assert ours[:2] == [0.0, 0.0]
    assert ours[2] != ours[2]
