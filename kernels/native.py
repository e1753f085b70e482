"""The ops of csrc/, built on first use.

By a compiler alone: no ninja, no Python headers, seconds instead of minutes. They use torch's
stable ABI, so that a library built with any torch from 2.11 on would run with any other; yet the
cache keeps one for each.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mtllm_engine.files import cache_folder

CSRC = Path(__file__).resolve().parents[1] / "csrc"  # in a checkout, and in a wheel
SOURCES = {"cpu": ("ops.cpp", "cpu/*.cpp"), "cuda": ("cuda/*.cpp", "cuda/*.cu")}
COMMON = ("-O3", "-std=c++17", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000")
FLAGS = {
    "cpu": (*COMMON, "-fPIC", "-fopenmp-simd"),
    "cuda": (
        *COMMON,
        "-DUSE_CUDA",
        "-Xcompiler=-fPIC",
        "--threads=0",
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
    ),
}
LIMIT_S = 600  # for one build; a compiler that takes longer hangs


@functools.cache
def load(device: str) -> None:
    """Registers the ops of a device type as `torch.ops.mtllm.*`.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ImportError: There is no compiler, or its library does not load here; in one line.
    """
    if device == "cuda":
        load("cpu")  # has the schemas
        _check_cuda()
    try:
        torch.ops.load_library(build(device))
    except OSError as error:
        raise ImportError(f"the library does not load: {error.__cause__ or error}") from error


def build(device: str) -> Path:
    """The library for a device type, from the user's cache if it is there.

    Of several processes one builds and the others wait for it; the lock ends with the process that
    holds it.

    Raises:
        ImportError: There is no compiler, or it fails; in one line.
    """
    compiler = _find_compiler(device)
    command = [*compiler, *_arguments(device)]
    try:
        folder = cache_folder()
    except ValueError as error:
        raise ImportError(str(error)) from error
    path = folder / f"{device}-{_fingerprint(command, _run([*compiler, '--version']))}.so"
    if path.exists():
        return path
    with _lock(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as unfinished:
        if not path.exists():
            library = Path(unfinished) / path.name
            _run([*command, "-o", str(library)])
            library.replace(path)
    return path


def _arguments(device: str) -> list[str]:
    sources = [str(path) for pattern in SOURCES[device] for path in sorted(CSRC.glob(pattern))]
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    names = ("torch_cpu", "torch_cuda")
    linked = [f"-l{name}" for name in names if (libraries / f"lib{name}.so").exists()]
    return [*FLAGS[device], f"-I{include}", *sources, f"-L{libraries}", *linked]


def _find_compiler(device: str) -> list[str]:
    command = ["nvcc"] if device == "cuda" else shlex.split(os.environ.get("CXX") or "g++")
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")  # which few have on their path
    path = shutil.which(command[0]) or shutil.which(command[0], path=f"{cuda}/bin")
    if path is None:
        raise ImportError(f"there is no {command[0]}")
    return [path, *command[1:]]


def _check_cuda() -> None:
    """Asks that nvcc's CUDA has torch's major version, for drivers serve one of them.

    Raises:
        ImportError: It has another.
    """
    version = _run([*_find_compiler("cuda"), "--version"])
    release = version.partition("release ")[2].partition(",")[0]
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != release.split(".")[0]:
        raise ImportError(f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}")


def _fingerprint(command: list[str], compiler_version: str) -> str:
    """Names a build by all it depends on: machines share homes, and caches outlive versions."""
    machine = (platform.machine(), *platform.libc_ver())
    environment = (*command, compiler_version, torch.__version__, *machine)
    digest = hashlib.sha256("\0".join(environment).encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(CSRC)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Some network file systems have no locks: then all build, and replace
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> str:
    """Its standard output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImportError(f"{Path(command[0]).name} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise ImportError(f"{Path(command[0]).name} fails: {first.strip()}")
    return done.stdout
