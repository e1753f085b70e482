"""How ranks start and end: the launcher's command, the entry of a launched module, requests to
stop."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.world import AgreedError, World, connect


def launcher(module: str, gpus: int) -> list[str]:
    """The command that starts a module's ranks on this node; sets what their environment needs."""
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
    world = None
    try:
        config = configs.load(words[0], words[1:], finetunes=finetunes)
        world = connect()
        function(config, world)
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
    """Prints an error in one line, once if all ranks have met it, and lets them leave.

    Args:
        world: None before the ranks have met.
    """
    is_common = world is None or isinstance(error, AgreedError)
    if not is_common or os.environ.get("RANK", "0") == "0":
        print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
    if world is not None and isinstance(error, AgreedError):
        world.close()  # after an error of one rank alone the others would be waited for in vain


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
    previous = {
        each: signal.signal(each, lambda *_: caught.append(time.time())) for each in signals
    }
    try:
        yield lambda: bool(caught) or stop_file.exists()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop_file.exists() and os.environ.get("RANK", "0") == "0":
            stop_file.unlink()
