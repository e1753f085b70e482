"""Every GPU kernel compiles for A100 and H100 without a GPU, and fits them."""

import ast
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtllm_engine import kernels
from tests.support.machine import ROOT

pytest.importorskip("triton")

ARCHS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can opt in to
MAX_REGISTERS = 255  # more cannot be addressed
# Of ops bound by memory: half of all warps or more must be resident
BUDGETS = {"rms_norm": 64, "rope": 64, "swiglu": 64}
# On sm_90, these and no others: lora_linear/low_rank.py says why not its own products
WGMMA = {"_update", "_masked_update"}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """A row per kernel, variant and chip, or an op and its error."""
    jobs = [functools.partial(triton_rows, arch) for arch in ARCHS]
    if NVCC:
        pairs = itertools.product(SOURCES, ARCHS)
        jobs += [functools.partial(nvcc_rows, source, arch) for source, arch in pairs]
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(lambda job: job(), jobs) for row in rows]


def triton_rows(arch: int) -> list[dict]:
    """What compile_worker.py says; a second run takes seconds, for Triton keeps binaries."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.compile_worker", str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def nvcc_rows(source: Path, arch: int) -> list[dict]:
    target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    options = ["-cubin", f"-arch={target}", "-std=c++17", "-O3", "-Xptxas=-v", "-o", os.devnull]
    command = [NVCC, *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [{"op": source.stem, "error": f"nvcc for {target}:\n{done.stderr}"}]
    return list(ptxas_rows(source.stem, arch, done.stderr))


def ptxas_rows(op: str, arch: int, log: str) -> Iterator[dict]:
    """The kernels of `ptxas -v`, which says of each its name, its spills and its registers."""
    for entry in log.split("Compiling entry function '")[1:]:
        shared = re.search(r"(\d+) bytes smem", entry)  # not said where it takes none
        yield {
            "op": op,
            "kernel": demangled(entry.split("'")[0]),
            "arch": arch,
            "registers": int(re.search(r"(\d+) registers", entry)[1]),
            "spill_bytes": int(re.search(r"(\d+) bytes spill stores", entry)[1]),
            "shared_bytes": int(shared[1]) if shared else 0,
        }


def demangled(symbol: str) -> str:
    """The last name in a C++ symbol: `copy` in `_ZN1n4copyIfEEvPf`, n::copy<float>(float*)."""
    names, rest = [], symbol
    while match := re.search(r"(\d+)([A-Za-z_]\w*)", rest):
        length = int(match[1])
        names.append(match[2][:length])
        rest = match[2][length:]
        if not rest[:1].isdigit():
            break
    return names[-1] if names else symbol


def named(rows: list[dict]) -> list[str]:
    return [f"{row['op']}: {row['kernel']} on sm_{row['arch']}: {row}" for row in rows]


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "error" not in row]


def launched_kernels() -> set[str]:
    """The jit functions of kernels/ that no other one calls."""
    functions = [
        node
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    ]
    calls = [node for each in functions for node in ast.walk(each) if isinstance(node, ast.Call)]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    return {each.name for each in functions} - called


def test_everything_compiles(compiled):
    errors = [f"{row['op']}: {row['error']}" for row in compiled if "error" in row]
    assert not errors, "\n".join(errors)


def test_nothing_is_left_out(compiled):
    """For what is not looked at passes all the tests here."""
    ops = {
        name
        for name, op in kernels.discover().items()
        if any(each.source == "triton" for each in op.implementations.values())
    }
    names = launched_kernels()
    assert ARCHS and ops and names
    assert ops.issuperset(BUDGETS) and names.issuperset(WGMMA)
    for arch in ARCHS:
        rows = [row for row in measured(compiled) if row["arch"] == arch]
        assert ops <= {row["op"] for row in rows}
        assert names <= {row["kernel"] for row in rows}


@pytest.mark.skipif(not NVCC, reason="no nvcc: csrc/cuda/*.cu is not compiled here")
def test_no_cuda_source_is_left_out(compiled):
    assert ARCHS and SOURCES
    for source, arch in itertools.product(SOURCES, ARCHS):
        names = set(re.findall(r"__global__ void .*?(\w+)\(const", source.read_text()))
        rows = [row for row in measured(compiled) if row["arch"] == arch]
        assert names and names <= {row["kernel"] for row in rows if row["op"] == source.stem}


def test_nothing_spills(compiled):
    assert not named([row for row in measured(compiled) if row["spill_bytes"]])


def test_registers_are_within_budget(compiled):
    rows = measured(compiled)
    limits = [BUDGETS.get(row["op"], MAX_REGISTERS) for row in rows]
    assert not named([row for row, limit in zip(rows, limits) if row["registers"] > limit])


def test_shared_memory_fits(compiled):
    rows = measured(compiled)
    assert not named([row for row in rows if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]])


def test_hoppers_matrix_units_are_used_where_they_can_be(compiled):
    rows = [row for row in measured(compiled) if row["arch"] == 90]
    assert not named([row for row in rows if row.get("wgmma", False) != (row["kernel"] in WGMMA)])
