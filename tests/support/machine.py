"""Where tests run: the checkout, its threads, and worlds of ranks on this machine's CPU."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mtllm_engine.kernels.lora_linear import check_available

from mtllm_engine.training.launch import free_port

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 1800.0
"""After so long something waits for ever: far more than anything takes on a slow, busy machine."""


def need_fp8() -> None:
    """Skips a test where torch cannot multiply fp8 on a CPU, as 2.11 cannot."""
    try:
        check_available("fp8", torch.device("cpu"), torch.float32)
    except ValueError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Tensors are computed with so many threads.

    Small ones gain nothing from a second thread, and lose much where the other cores are busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def launch(world_size: int, module: str, *arguments: str | Path, local_size: int = 0) -> list[str]:
    """Runs `python -m MODULE ARGUMENTS` as the ranks of a world, to their end; what each said. A
    failing rank's output is the error.

    Args:
        local_size: As if machines had so many ranks each; 0: all are on one.
    """
    local_size = local_size or world_size
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(local_size)}
    # Or another checkout's code might run, which the environment has installed.
    shared["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local_size)}
        ranks.append(subprocess.Popen(command, env=os.environ | shared | own, **pipes))
    try:
        outputs = [rank.communicate(timeout=HANG_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = any(rank.returncode for rank in ranks)
    assert not failed, "\n".join(output[-3000:] for output in outputs)
    return outputs
