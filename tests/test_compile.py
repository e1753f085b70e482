"""Every GPU kernel compiles for A100 and H100 without a GPU, fits them, and shows in one table what it takes."""

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

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can opt in to
MAX_REGISTERS = 255  # more cannot be addressed
BUDGETS = {"rms_norm": 64, "rope": 64, "swiglu": 64}  # bound by memory: half of all warps or more must be resident
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled(request) -> list[dict]:
    """A row per kernel, variant and chip, or an op and its error; the table of them goes to the terminal."""
    jobs = [lambda arch=arch: triton_rows(arch) for arch in ARCHS]
    if NVCC:
        jobs += [lambda source=source, arch=arch: nvcc_rows(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(lambda job: job(), jobs) for row in found]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + table([row for row in rows if "error" not in row]), file=sys.stderr)  # workers have no stdout
    return rows


def triton_rows(arch: int) -> list[dict]:
    """What compile_worker.py says; compiled binaries stay in Triton's cache, so a second run takes seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "compile_worker.py"), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def nvcc_rows(source: Path, arch: int) -> list[dict]:
    target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    command = [NVCC, "-cubin", f"-arch={target}", "-std=c++17", "-O3", "-Xptxas=-v", "-o", os.devnull, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [{"op": source.stem, "error": f"nvcc for {target}:\n{done.stderr}"}]
    return list(ptxas_rows(source.stem, arch, done.stderr))


def ptxas_rows(op: str, arch: int, log: str) -> Iterator[dict]:
    """The kernels of `ptxas -v`, which says for each its name, then its spills, then its registers."""
    for entry in log.split("Compiling entry function '")[1:]:
        number = {
            name: re.search(rf"(\d+) {name}", entry) for name in ("bytes spill stores", "registers", "bytes smem")
        }
        spills, registers, shared = (int(found[1]) if found else 0 for found in number.values())
        row = {"op": op, "kernel": demangled(entry.split("'")[0]), "arch": arch, "registers": registers}
        yield row | {"spill_bytes": spills, "shared_bytes": shared, "wgmma": False}


def demangled(symbol: str) -> str:
    """The last name in a C++ symbol, without its arguments: `_ZN1n4copyIfEEvPf` is n::copy<float>(float*)."""
    names, rest = [], symbol
    while found := re.search(r"(\d+)([A-Za-z_]\w*)", rest):
        length = int(found[1])
        names.append(found[2][:length])
        rest = found[2][length:]
        if not rest[:1].isdigit():
            break
    return names[-1] if names else symbol


def table(rows: list[dict]) -> str:
    """One line per kernel and chip: the most that any of its variants takes."""
    lines = [f"{'kernel':44} {'chip':>5} {'variants':>8} {'registers':>9} {'spilled':>8} {'shared':>8}  wgmma"]
    for op, kernel, arch in sorted({(row["op"], row["kernel"], row["arch"]) for row in rows}):
        same = [row for row in rows if (row["op"], row["kernel"], row["arch"]) == (op, kernel, arch)]
        registers, spilled, shared = (
            max(row[key] for row in same) for key in ("registers", "spill_bytes", "shared_bytes")
        )
        wgmma = {0: "-", len(same): "yes"}.get(sum(row["wgmma"] for row in same), "some")
        name = f"{op}: {kernel.strip('_')}"
        lines.append(f"{name:44} sm_{arch} {len(same):8} {registers:9} {spilled:6} B {shared:6} B  {wgmma}")
    return "\n".join(lines)


def named(rows: list[dict]) -> list[str]:
    return [f"{row['op']}: {row['kernel']} on sm_{row['arch']}: {row}" for row in rows]


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "error" not in row]


def test_everything_compiles(compiled):
    errors = [f"{row['op']}: {row['error']}" for row in compiled if "error" in row]
    assert not errors, "\n".join(errors)
    ops = {
        name
        for name, op in kernels.discover().items()
        if any(i.source == "triton" for i in op.implementations.values())
    }
    for arch in ARCHS:
        assert ops <= {row["op"] for row in compiled if row["arch"] == arch}


def test_nothing_spills(compiled):
    assert not named([row for row in measured(compiled) if row["spill_bytes"]])


def test_registers_are_within_budget(compiled):
    assert not named([row for row in measured(compiled) if row["registers"] > BUDGETS.get(row["op"], MAX_REGISTERS)])


def test_shared_memory_fits(compiled):
    assert not named([row for row in measured(compiled) if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]])


def test_gemms_use_hoppers_matrix_units(compiled):
    gemms = [row for row in measured(compiled) if row["arch"] == 90 and "gemm" in row["kernel"]]
    assert not named([row for row in gemms if not row["wgmma"]])


@pytest.mark.skipif(not SOURCES, reason="csrc/cuda has no .cu file")
@pytest.mark.skipif(not NVCC, reason="no nvcc: csrc/cuda/*.cu is not compiled here")
def test_cuda_sources_compile(compiled):
    seen = {(row["op"], row["arch"]) for row in measured(compiled)}
    assert {(source.stem, arch) for source in SOURCES for arch in ARCHS} <= seen
