"""One rank of a ZeRO-3 world that trains once: `python second_worker.py CONFIG`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from mtllm_engine.config import Config, dumps, load
from mtllm_engine.train import train
from mtllm_engine.world import connect


def launch(config: Config, path: Path, *, world_size: int = 2) -> None:
    """Trains with a configuration on several ranks; a failing rank's output is the error."""
    path.write_text(dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["PYTHONPATH"] = Path(__file__).resolve().parent.parent  # a script's own folder is not the checkout's
    shared = os.environ | {key: str(value) for key, value in shared.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, __file__, path], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in map(str, range(world_size))
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(output[-3000:] for output in outputs)


def rows(run: Path) -> list[dict]:
    """All that a run's metrics.jsonl says."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows(run) if "loss" in row]


if __name__ == "__main__":
    world = connect(timeout_s=120)
    train(load(sys.argv[1]), world)
    world.close()
