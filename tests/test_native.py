"""csrc/ is built once however many ask, anywhere a compiler is; where none is, the reason takes one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mtllm_engine.kernels.distill_loss import distill_loss

from mtllm_engine.kernels import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from mtllm_engine.kernels import native; native.load('cpu'); print(native.build('cpu'))"
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")


def start(**environment: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", BUILD], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@needs_compiler
def test_processes_that_start_together_build_once(tmp_path: Path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo >> {tmp_path}/builds\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    processes = [start(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    outputs = {process.communicate()[0].strip() for process in processes}
    (library,) = outputs
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "\n"
    assert sorted(path.suffix for path in (tmp_path / "mtllm").iterdir()) == [".lock", ".so"]
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
        ("echo warning: w >&2; echo 'ops.cpp:2: error: e' >&2; exit 1", "compiler fails: ops.cpp:2: error: e"),
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
    with pytest.raises(ImportError, match="there is no nvcc|nvcc is of CUDA .*, torch of CUDA None"):
        native.load("cuda")


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads():
    case = {"width": 512, "student": (3, 700, 64, 65) * 9, "teacher": (1, 90, 130, 2) * 9, "gap": 1, "aligned": True}
    arguments = distill_loss.inputs(torch.Generator().manual_seed(0), torch.float32, **case)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        distilled = distill_loss.implementations["c++"].function(**arguments)
        loss = distilled.pooled_error + distilled.token_error
        return [*distilled, *torch.autograd.grad(loss, arguments["student_SD"])]

    before = torch.get_num_threads()
    try:
        one, five = results(1), results(5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))
