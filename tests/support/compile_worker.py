"""Compiles all that the Triton implementations launch at real shapes, for a GPU that is not there.

`python compile_worker.py 90` prints a JSON line for each kernel it compiled for sm_90, or that
could not be. Tensors are on `meta`: they have shapes, dtypes and autograd but no data, so nothing
is executed, and whatever would wait for the GPU (`.item()` and the like) fails here.
"""

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import triton
from mtllm_engine.kernels.contract import Kernel, named_tensors
from mtllm_engine.kernels.lora_linear.rows import quantise_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from mtllm_engine import kernels

MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was launched: with one set of constants, argument types and options."""

    op: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool


class Offline:
    """Triton's driver for a GPU that is not there: enough for launches that only compile."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Offline(arch))
    for factory in ("rand", "randn", "randint"):  # `meta` has no generators
        setattr(torch, factory, without_generator(getattr(torch, factory)))
    for op, kernel in kernels.discover().items():
        launched = intercept_launches()
        for label, implementation in kernel.implementations.items():
            if implementation.source == "triton":
                report_errors(op, label, kernel, implementation.function, launched)
        if op == "lora_linear":
            quantise_a_row_of_each_kind()
        for compiled in {each.hash: each for each in launched}.values():
            print(json.dumps(asdict(measure(op, arch, compiled))), flush=True)


def quantise_a_row_of_each_kind() -> None:
    """What only a quantised weight launches: inputs, and gradients with a scale for each column."""
    for width in (4096, 28672):
        x_SD = torch.empty(16384, width, dtype=torch.bfloat16, device="meta")
        quantise_rows(x_SD)
        quantise_rows(x_SD, torch.empty(width, device="meta"))


def without_generator(factory: Callable) -> Callable:
    return lambda *args, generator=None, **options: factory(*args, **options)


def intercept_launches(run: Callable = JITFunction.run) -> list[CompiledKernel]:
    """What launches `kernel[grid](...)` compile from now on, instead of running it."""
    launched = []

    def compile_only(function, *args, grid, warmup, **options):
        if not all(0 < size <= limit for size, limit in zip(grid, MAX_GRID)):
            raise ValueError(f"{function.__name__}: no GPU has a grid of {grid}")
        launched.append(run(function, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    return launched


def report_errors(op: str, label: str, kernel: Kernel, function: Callable, launched: list) -> None:
    """Calls the function at the op's shapes, with every gradient that they may ask for."""
    trained = [shape | {"grad": True} for shape in kernel.shapes if "grad" in shape]
    for shape in (*kernel.shapes, *trained):
        before = len(launched)
        try:
            call(kernel, function, shape)
            assert len(launched) > before, "nothing was launched"
        except Exception:  # the other ops shall still be seen
            error = f"{label} at {shape}:\n{traceback.format_exc()}"
            print(json.dumps({"op": op, "error": error}), flush=True)


def call(kernel: Kernel, function: Callable, shape: dict) -> None:
    """Forward as in evaluation, then forward and backward."""
    generator = SimpleNamespace(device=torch.device("meta"))
    with torch.no_grad():
        function(**kernel.inputs(generator, torch.bfloat16, **shape))
    outputs = named_tensors(function(**kernel.inputs(generator, torch.bfloat16, **shape))).values()
    outputs = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def measure(op: str, arch: int, compiled: CompiledKernel) -> Compiled:
    usage = resource_usage(compiled.asm["cubin"])
    return Compiled(
        op=op,
        kernel=compiled.metadata.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in compiled.asm["ptx"],
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    main(int(sys.argv[1]))
