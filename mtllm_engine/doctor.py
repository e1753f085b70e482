"""`mtllm doctor`: whether this machine can train, what runs here and why, and what to do where
something is amiss.
"""

import contextlib
import json
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PYTHON = (3, 11)
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "tokenizers", "webdataset")
OPTIONAL = {
    "triton": "the GPU's kernels are written in it",
    "flash-attn": 'for model.attention = "flash_attn"',
    "flash-attn-4": 'for model.attention = "flash_attn_4"',
    "bitsandbytes": 'for model.quantization = "nf4"',
}
CLOSED = 1024  # files that a process may have open, of which a rank needs about so many
SHARED_BYTES = 1 << 26  # of /dev/shm, by which ranks of a node talk
FREE_BYTES = 5 << 30
PATH = re.compile(r"(?<![\w.])~?/(?:[^\s/:'\"]+/)+")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of what was looked at."""

    name: str
    value: str
    fix: str = ""
    """What to do; "": it is in order."""
    is_needed: bool = True
    """Whether training cannot run where it is not in order."""

    @property
    def ok(self) -> bool:
        return not self.fix


def examine() -> list[Finding]:
    """Looks at everything; nothing is changed but that native kernels are built, as training
    would."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _kernels,
        _compiler,
        _collectives,
        _rooms,
    )
    return [finding for part in parts for finding in _safely(part)]


def as_text(findings: list[Finding]) -> str:
    """A line each: OK, or what to do."""
    width = max(len(each.name) for each in findings)
    lines = []
    for each in findings:
        mark = "OK " if each.ok else "no " if each.is_needed else "-  "
        lines.append(f"{mark} {each.name:<{width}}  {each.value}{_then(each.fix)}")
    bad = [each.name for each in findings if each.is_needed and not each.ok]
    end = f"training cannot run here: {', '.join(bad)}" if bad else "training can run here"
    return "\n".join([*lines, end])


def _then(fix: str) -> str:
    return f"; {fix}" if fix else ""


def as_json(findings: list[Finding]) -> str:
    """The same for a bug report: without names of people and machines, and without paths."""
    rows = [
        {
            "name": each.name,
            "ok": each.ok,
            "needed": each.is_needed,
            "value": _anonymous(each.value),
            "fix": _anonymous(each.fix),
        }
        for each in findings
    ]
    return json.dumps({"format": "mtllm-doctor/1", "findings": rows}, indent=1)


def _anonymous(text: str) -> str:
    """Of a path its last name, and nobody's and no machine's."""
    text = PATH.sub("", text)
    for name in {socket.gethostname(), platform.node(), Path.home().name, *_users()} - {""}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
    return text


def _users() -> Iterator[str]:
    import getpass

    with contextlib.suppress(KeyError, OSError, ImportError):
        yield getpass.getuser()


def _safely(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A part that breaks is a line, and no end of the others."""
    try:
        yield from part()
    except Exception as error:  # of any library, broken in any way
        name, said = part.__name__.strip("_"), " ".join(str(error).split())
        yield Finding(name=name, value=f"{type(error).__name__}: {said}", fix="install it again")


def _versions() -> Iterator[Finding]:
    wanted = ".".join(map(str, PYTHON))
    is_new = tuple(map(int, platform.python_version_tuple()[:2])) >= PYTHON
    fix = "" if is_new else f"take {wanted} or later"
    yield Finding(name="python", value=platform.python_version(), fix=fix)
    yield Finding(name="mtllm-engine", value=_our_version())
    for package in PACKAGES:
        version = _version(package)
        fix = "" if version else f"pip install {package}, or this project again"
        yield Finding(name=package, value=version or "not installed", fix=fix)
    for package, use in OPTIONAL.items():
        version = _version(package)
        yield Finding(name=package, value=version or f"not installed: {use}", is_needed=False)


def _our_version() -> str:
    from mtllm_engine.training.log import commit

    version, of = _version("mtllm-engine") or "not installed", commit()
    return f"{version}, commit {of}" if of else version


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    extensions = torch.backends.cpu.get_cpu_capability()
    yield Finding(name="CPU", value=f"{cores} cores, {platform.machine()}, {extensions}")
    has_driver = os.path.exists("/dev/nvidiactl")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            size = f"{of.total_memory / 1e9:.0f} GB, capability {of.major}.{of.minor}"
            yield Finding(
                name=f"GPU {number}", value=f"{of.name}, {size}, CUDA {torch.version.cuda}"
            )
    elif has_driver:
        has = f"there is one, and torch (CUDA {torch.version.cuda}) does not see it"
        fix = "install the torch of your driver's CUDA, and look at CUDA_VISIBLE_DEVICES"
        yield Finding(name="GPU", value=has, fix=fix)
    else:
        yield Finding(name="GPU", value="none: ranks run on the CPU", is_needed=False)


def _kernels() -> Iterator[Finding]:
    from mtllm_engine import kernels
    from mtllm_engine.kernels.attention import select
    from mtllm_engine.world import device_type

    device = device_type()
    for name, kernel in kernels.discover().items():
        if name == "attention":
            kernel = select("auto", device)
        yield Finding(name=f"kernel {name}", value=kernel.label(device))


def _compiler() -> Iterator[Finding]:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    lack = "none: kernels in C++ give way to PyTorch's, which are slower; install g++"
    value = Path(found).name if found else lack
    yield Finding(name="C++ compiler", value=value, is_needed=False)
    nvcc = shutil.which("nvcc")
    value = Path(nvcc).name if nvcc else "none: kernels in CUDA give way to Triton's"
    yield Finding(name="CUDA compiler", value=value, is_needed=False)


def _collectives() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    has_gloo = dist.is_available() and dist.is_gloo_available()
    fix = "" if has_gloo else "install a torch with gloo: ranks agree by it"
    yield Finding(name="gloo", value="there" if has_gloo else "not in this torch", fix=fix)
    if torch.cuda.is_available():
        has_nccl = dist.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this torch"
        fix = "" if has_nccl else "install a torch with NCCL: GPUs talk by it"
        yield Finding(name="NCCL", value=version, fix=fix)
    else:
        yield Finding(name="NCCL", value="not needed without a GPU", is_needed=False)
    yield _port()


def _port() -> Finding:
    """Whether two ends on this machine can talk: the ranks meet so."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5):
                server.accept()[0].close()
    except OSError as error:
        fix = "let processes of this machine talk on 127.0.0.1: ranks meet there"
        return Finding(name="ports", value=f"127.0.0.1: {error.strerror or error}", fix=fix)
    return Finding(name="ports", value="free ones on 127.0.0.1, and they connect")


def _rooms() -> Iterator[Finding]:
    """Memory, disks, and what else ends."""
    from mtllm_engine.files import cache_folder

    available = _available_bytes()
    yield Finding(
        name="memory", value=f"{gigabytes(host_bytes())}, {gigabytes(available)} of it free"
    )
    free = shutil.disk_usage(Path.cwd()).free
    fix = "" if free > FREE_BYTES else "checkpoints may not fit: free some, or work elsewhere"
    yield Finding(name="disk here", value=f"{gigabytes(free)} free", fix=fix, is_needed=False)
    try:
        free = shutil.disk_usage(cache_folder()).free
        yield Finding(name="cache", value=f"can be written, {gigabytes(free)} free")
    except ValueError as error:
        yield Finding(name="cache", value="cannot be written", fix=str(error))
    yield _shared_memory()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "" if limit >= CLOSED or limit < 0 else f"raise it: ulimit -n {min(most, 4 * CLOSED)}"
    yield Finding(name="open files", value=f"{limit} at once", fix=fix)


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding(name="/dev/shm", value="none", is_needed=False)
    size = shutil.disk_usage("/dev/shm").total
    fix = "" if size >= SHARED_BYTES else "give a container more: docker run --shm-size=1g"
    return Finding(name="/dev/shm", value=gigabytes(size), fix=fix, is_needed=False)


def memory_bytes() -> int:
    """What there is for a rank on a GPU, or for all ranks on the CPU."""
    import torch

    if torch.cuda.is_available():
        numbers = range(torch.cuda.device_count())
        return min(torch.cuda.get_device_properties(each).total_memory for each in numbers)
    return host_bytes()


def host_bytes() -> int:
    """The machine's memory, or the share of it that a container may use."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min(int(kilobytes) * 1024, host_bytes())


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
