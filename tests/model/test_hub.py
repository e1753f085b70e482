"""A hub of our own, asked by the real client in a process of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mtllm_engine.model.hub import snapshot, wanted_files
from mtllm_engine.model.tensors import resolve
from mtllm_engine.training.checkpoint import follow
from tests.support.machine import ROOT
from tests.support.tiny import build_config

COMMIT = 40 * "a"
BOTH = ("config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors")
REPOSITORIES = {
    "own/both": (*BOTH, "tokenizer.model", "README.md", "original/params.json"),
    "own/torch": ("config.json", "pytorch_model-00001-of-00001.bin", "tokenizer.json"),
    "own/adapters": ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"),
    "own/packed": ("small-Q4.gguf", "config.json"),
    "own/gated": BOTH,
}
PROGRAM = """
import json, sys
from mtllm_engine.model.hub import fetch
said = {}
for name in sys.argv[1:]:
    try:
        folder = fetch(name)
        said[name] = sorted(path.name for path in folder.iterdir())
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    def do_GET(self):
        _, api, models, *rest = self.path.partition("?")[0].split("/")
        if (api, models) == ("api", "models"):
            self._tell(rest)
        else:
            name = f"{api}/{models}"
            is_gated = name == "own/gated"
            headers = {"X-Error-Code": "GatedRepo"} if is_gated else {}
            self._answer(self.path.encode(), 403 if is_gated else 200, headers)

    do_HEAD = do_GET

    def _tell(self, rest: list[str]) -> None:
        names = REPOSITORIES.get("/".join(rest[:2]))
        if rest[1] == "broken":
            self._answer(b"{}", 500)
        elif names is None:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif rest[2:3] == ["tree"]:
            tree = [{"type": "file", "path": each, "size": 9, "oid": each} for each in names]
            self._answer(json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": each} for each in names]
            about = {"id": "/".join(rest[:2]), "sha": COMMIT, "siblings": siblings}
            self._answer(json.dumps(about).encode())

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        common = {"Content-Length": str(len(body)), "ETag": '"0"', "X-Repo-Commit": COMMIT}
        for key, value in (common | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(home: Path, url: str, *names: str, **environment: str) -> dict[str, list[str] | str]:
    """What `fetch` makes of names: a snapshot's files, or its message."""
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_TOKEN": "none", "HF_HUB_ETAG_TIMEOUT": "2"}
    hub |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(
        command, env=os.environ | hub | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_format_is_fetched_and_every_refusal_says_what_to_do(tmp_path: Path, url: str):
    names = [*REPOSITORIES, "own/none", "own/broken", "a/b/c", "../none", "own/"]
    said = ask(tmp_path, url, *names)
    assert said["own/both"] == ["config.json", "model.safetensors", "tokenizer.model"]
    assert said["own/torch"] == sorted(REPOSITORIES["own/torch"])
    assert said["own/adapters"] == ["adapter_config.json", "adapter_model.safetensors"]
    gated = f"own/gated is gated on the hub: accept its conditions at {url}/own/gated, then `hf"
    assert said["own/gated"].startswith(gated)
    assert "`mtllm models import FILE --out DIR`" in said["own/packed"]
    assert said["own/none"].startswith("own/none is neither a folder nor a model of the hub: mind")
    assert said["own/broken"].startswith("the hub does not give own/broken; try again later: ")
    for name in names[-3:]:
        assert said[name].startswith(f"{name} is neither a folder nor a model's name on the hub")
    assert not any("\n" in each for each in said.values() if isinstance(each, str))


def test_without_a_network_what_was_fetched_is_read(tmp_path: Path, url: str):
    fetched = ask(tmp_path, url, "own/both")
    nowhere = "http://127.0.0.1:9"  # a port that nobody listens at
    for endpoint, environment, reason in (
        (url, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it, or run `hf download"),
        (nowhere, {}, f"{nowhere} cannot be reached: name a folder that `hf download own/torch"),
    ):
        said = ask(tmp_path, endpoint, "own/both", "own/torch", **environment)
        assert said["own/both"] == fetched["own/both"]
        assert said["own/torch"].startswith(
            "there is no folder own/torch, and no such model in the hub's cache"
        )
        assert reason in said["own/torch"]


def test_of_an_exported_folder_all_folders_are_fetched():
    names = ["mtllm.json", "encoder/model.safetensors", "student/projection.safetensors"]
    names += ["llm/model-00001-of-00002.safetensors", "encoder/config.json"]
    assert wanted_files([*names, "modeling_mtllm.py"]) == names
    trained = ["adapter_config.json", "adapter_model.safetensors", "checkpoint-5/adapter_model.bin"]
    assert wanted_files(trained) == trained[:2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.gguf", "m.gguf is GGUF, .* `mtllm models import .*m.gguf --out DIR`, and name DIR"),
        (".", "`mtllm models import .*m.gguf --out DIR`"),
        ("model.safetensors", "model.safetensors is a file; name its folder, "),
    ],
)
def test_a_file_for_a_folder_is_told(tmp_path: Path, name: str, message: str):
    for each in ("m.gguf", "model.safetensors"):
        (tmp_path / each).touch()
    with pytest.raises(ValueError, match=message):
        resolve(str(tmp_path / name))


def test_a_checkpoint_may_be_a_hub_id_and_a_place_is_none(tmp_path: Path):
    there = tmp_path / "stage1"
    there.mkdir()
    for name in ("", "stage1", "runs/stage1/checkpoints/latest", "../a/b", "/a", str(there)):
        assert snapshot(name) == name
    model = {"init_from": ["own/adapters", str(there)], "teacher": "own/teacher"}
    config = follow(build_config(tmp_path, model=model), lambda name: name.replace("own/", "/hub/"))
    assert config.model.init_from == ("/hub/adapters", str(there))
    assert config.model.teacher == "/hub/teacher"
