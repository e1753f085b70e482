"""How ranks start and end: the launcher's command, the entry of a launched module, requests to
stop."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.files import process_stat
from mtllm_engine.training.lock import started
from mtllm_engine.world import AgreedError, World, check_gpus, connect

LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
LAUNCHERS |= {"torchrun", "torch.distributed.run", "torch.distributed.launch"}
LAUNCHERS |= {"mtllm", "mtllm_engine.cli"}
"""Commands and modules that ranks do not outlive."""
GRACE_S = 5.0  # in which a launcher that was asked to stop, and left first, asks its ranks

_watched: dict[int, str] = {}  # the processes that this one leaves with
_stopping = threading.Event()  # a signal asked for a stop in order


def launcher(module: str, gpus: int) -> list[str]:
    """The command that starts a module's ranks on this node; sets what their environment needs.

    Raises:
        ValueError: There are fewer GPUs.
    """
    check_gpus(gpus)
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ranks that share cores must not spin while they wait.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    options = ["--num_gpus", str(gpus), "--master_port", str(free_port())]
    return [*command, *options, "--module", module]


def free_port() -> int:
    """A TCP port of this machine that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_command(
    function: Callable[[Config, World], None],
    module: str,
    argv: Sequence[str] | None = None,
    *,
    finetunes: bool = False,
) -> int:
    """Entry of `deepspeed --module mtllm_engine.MODULE`; returns the exit status.

    What the user can mend is one line on stderr, told by one rank where all have met it.

    Args:
        finetunes: As for `config.load`.
    """
    words = launched_words(argv)
    if not words or words[0].startswith("-"):
        usage = f"deepspeed --num_gpus N --module mtllm_engine.{module}"
        print(f"usage: {usage} CONFIG [section.key=value ...]")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2

    def read() -> Callable[[World], None]:
        # Here, as it imports the engine, which who only launches has no use for.
        from mtllm_engine.model.hub import snapshot
        from mtllm_engine.training.checkpoint import follow

        config = configs.load(words[0], words[1:], finetunes=finetunes)
        return partial(function, follow(config, snapshot))

    return run_ranks(read)


def run_ranks(read: Callable[[], Callable[[World], None]], *, timeout_s: float = 1800.0) -> int:
    """Runs, on every rank of this process' launcher, what `read` makes of what was typed; returns
    the exit status.

    Args:
        timeout_s: So long ranks wait for one another.
    """
    if "RANK" in os.environ and (above := launchers(os.getpid())):
        leave_with(above)
    world = None
    try:
        function = read()
        world = connect(timeout_s=timeout_s)
        function(world)
    except (ValueError, OSError) as error:
        tell(error, "mtllm", world)
        return 1
    world.close()
    return 0


def launched_words(argv: Sequence[str] | None = None) -> list[str]:
    """A launched module's arguments, without the `--local_rank=N` that DeepSpeed's launcher puts
    first."""
    words = sys.argv[1:] if argv is None else argv
    return [word for word in words if not word.startswith("--local_rank")]


def tell(error: Exception, program: str, world: World | None) -> None:
    """Prints an error in one line, once if all ranks have met it, and lets them leave. Before the
    ranks have met, once on each machine: another may have no such error.

    Args:
        world: None before the ranks have met.
    """
    if world is None:
        tells = os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        tells = world.is_main or not isinstance(error, AgreedError)
    if tells:
        print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
    if world is not None and isinstance(error, AgreedError):
        world.close()  # after an error of one rank alone the others would be waited for in vain


def launchers(process: int) -> dict[int, str]:
    """The processes that started one as a rank, with when they were started: from its parent up, as
    long as they are launchers. The shell or script that started these may end before them.
    """
    found: dict[int, str] = {}
    while _is_launcher(process := _parent(process)):
        found[process] = started(process)
    return found


def _parent(process: int) -> int:
    """0 if it is gone."""
    stat = process_stat(process)
    return int(stat[1]) if stat else 0


def _is_launcher(process: int) -> bool:
    folder = Path(f"/proc/{process}")
    try:
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[1:]
        is_python = (folder / "exe").readlink().name.startswith("python")
    except OSError:  # another user's, or gone
        return False
    program = next((word for word in words if not word.startswith("-")), "")
    return is_python and (program in LAUNCHERS or os.path.basename(program) in LAUNCHERS)


def leave_with(processes: dict[int, str], *, poll_s: float = 1.0) -> None:
    """Ends this process soon after one of others is gone that nobody asked to stop: a killed
    launcher leaves its ranks behind, and the same command again would be a second run.

    Args:
        processes: As `launchers` returns them.
    """

    def watch() -> None:
        while not _is_one_gone():
            time.sleep(poll_s)
        # A launcher that got SIGTERM leaves before all its ranks have it: they stop in order.
        if _stopping.wait(GRACE_S):
            return
        if os.environ.get("RANK", "0") == "0":
            message = b"mtllm: error: the launcher is gone; its ranks leave and save nothing more\n"
            with contextlib.suppress(OSError):
                os.write(2, message)
        os._exit(1)

    _watched.update(processes)
    threading.Thread(target=watch, daemon=True).start()


def wait_if_abandoned() -> None:
    """Nothing more is saved once a launcher is gone: returns at once, or when a stop in order was
    asked for, or never."""
    while _is_one_gone() and not _stopping.is_set():
        time.sleep(0.1)


def _is_one_gone() -> bool:
    return any(started(process) != start for process, start in _watched.items())


@contextlib.contextmanager
def stop_requests(folder: Path) -> Iterator[Callable[[], bool]]:
    """Says whether to stop after this step: a signal was caught, or a file STOP lies in the run's
    folder.

    Handlers only set a flag: launchers signal ranks at different times, so the ranks agree at a
    step's start.
    """
    caught = []
    stop_file = folder / "STOP"
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def catch(*_: object) -> None:
        caught.append(time.time())
        _stopping.set()

    previous = {each: signal.signal(each, catch) for each in signals}
    try:
        yield lambda: bool(caught) or stop_file.exists()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop_file.exists() and os.environ.get("RANK", "0") == "0":
            stop_file.unlink()
