"""Who else is training: ranks, devices, and the few host-side agreements they make."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class AgreedError(ValueError):
    """An error that every rank raises, so that one may tell it and all may leave in order; `cause`
    is the original.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks. Agreements run on the host (gloo), so none waits for a GPU."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1  # ranks of this machine
    host_group: Any = None  # gloo; None when there is one rank and no process group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        """`gather` for equally many small integers: one collective, for use in every step."""
        if self.size == 1:
            return [values]
        gathered = torch.empty(self.size, len(values), dtype=torch.int64)
        dist.all_gather([*gathered], torch.tensor(values), group=self.host_group)
        return gathered.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on the device; the argument is overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on rank 0 alone and returns its result everywhere; a failure is raised on
        every rank.
        """
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except (ValueError, OSError) as raised:
                outcome = (None, raised)
        result, error = self.broadcast(outcome)
        if error is not None:
            raise AgreedError(error)
        return result

    def together(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on every rank; when it fails on one, every rank raises, so that none
        waits for ever.
        """
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
        self.agree_on(error)
        return result

    def agree_on(self, error: Exception | None) -> None:
        """Every rank brings the error it met, if any; when one did, all raise the first."""
        errors = [other for other in self.gather(error) if other is not None]
        if errors:
            raise AgreedError(errors[0])

    def close(self) -> None:
        """Leaves the process group: without it a rank can end in `terminate called` (exit
        code -6).
        """
        if dist.is_initialized():
            dist.barrier(group=self.host_group)
            dist.destroy_process_group()


def device_type() -> str:
    """ "cuda" where there is a GPU, else "cpu": what every rank of this machine trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def connect(*, timeout_s: float = 1800.0) -> World:
    """Joins the ranks that the launcher's environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or
    stands alone.

    Raises:
        ValueError: This machine has more ranks than GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # As torchrun says it, or DeepSpeed's launcher; who starts ranks by hand may not.
    counted = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    local_size = int(counted or size)
    device = torch.device("cuda", local_rank) if device_type() == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        if counted:
            check_gpus(local_size)
        torch.cuda.set_device(device)
    else:
        _share_cores(local_size)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # alone, without a launcher: ZeRO-3 wants a group and this variable all the same
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(
            backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
        )
    host_group = (
        dist.new_group(backend="gloo", timeout=timeout)
        if device.type == "cuda"
        else dist.group.WORLD
    )
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        device=device,
        local_size=local_size,
        host_group=host_group,
    )


def check_gpus(count: int) -> None:
    """Whether each of so many ranks of this machine has a GPU of its own, if they run on GPUs.

    Raises:
        ValueError: There are fewer.
    """
    there = torch.cuda.device_count()
    if device_type() == "cuda" and count > there:
        found = "there is one" if there == 1 else f"there are {there}"
        raise ValueError(f"{count} ranks need a GPU each, and {found}: use --gpus {there}")


def _share_cores(local_size: int) -> None:
    """CPU ranks split the cores between them; more threads than cores makes OpenMP wait for
    itself.
    """
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // local_size))
