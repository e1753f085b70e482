"""What a folder says of itself, and where it is pushed to."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, metadata_load

from mtllm_engine.export import export
from mtllm_engine.train import train
from mtllm_engine.training.trained import find_trained
from tests.support.exported import run_without_us, write_stack
from tests.support.machine import ROOT
from tests.support.stages import ALONE, build_models, stage1_config
from tests.support.tiny import build_corpus

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def land(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    build_models(folder)
    build_corpus(folder / "validation", 6)
    held_out = {"every": 2, "corpus": str(folder / "validation")}
    train(stage1_config(folder, validation=held_out), ALONE)
    (folder / "encoder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def test_the_card_says_how_it_was_made(land):
    out = export(land / "stage1", land / "out")
    card, record = (out / "README.md").read_text(), json.loads((out / "mtllm.json").read_text())
    front = metadata_load(out / "README.md")
    assert front["license"] == "cc-by-nc-4.0" and "swh" in front["language"]
    licences = card.index("encoder: **cc-by-nc-4.0**"), card.index("decoder: **unknown**")
    assert licences[0] < licences[1] < card.index("A machine-translation encoder")
    (run,) = record["about"]["runs"]
    manifest = json.loads((land / "train" / "manifest.json").read_text())
    corpus = {"fingerprint": manifest["fingerprint"], "language": "eng_Latn", "licence": "unknown"}
    assert run["corpora"] == [corpus]
    assert f"eng_Latn, manifest `{manifest['fingerprint']}`, licence unknown" in card
    assert "distillation from the bare LLM (stage 1): 3 steps, lr 0.01; rank 4, alpha 8" in card
    rows = map(json.loads, (land / "stage1" / "metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if "validation_fvu" in row][-1]
    commit = json.loads((land / "stage1" / "environment.json").read_text())["commit"]
    assert f"held out: fvu {last['validation_fvu']:.4g}" in card
    assert f"(after step {last['step']}, commit {commit or 'unknown'})" in card


def test_the_lines_of_python_in_the_card_run(land):
    out = export(land / "stage1", land / "lines")
    card = (out / "README.md").read_text()
    _, ours, theirs, _ = (block.partition("```\n")[0] for block in card.split("```python\n"))
    scope = {"DIR": str(out)}
    exec(ours, scope)
    program = f"DIR = {str(out)!r}\n{theirs}results['vectors'] = vectors"
    vectors = run_without_us(program, land)["vectors"]
    assert abs(scope["vectors"] - vectors).max() < 1e-5 * abs(vectors).max()


def test_a_quantised_base_is_exported_in_full_and_the_card_says_so(land):
    stack = write_stack(land, "small", model={"quantization": "nf4"}, zero={"stage": 0})
    card = (export(stack, land / "small-out") / "README.md").read_text()
    assert "the LLM's weights were held as nf4; this folder has them in full" in card


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for."""

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked[self.path.partition("?")[0]] = asked
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{self.server.url}/own/stack"})
        elif self.path.endswith("/preupload/main"):
            names = [each["path"] for each in json.loads(asked)["files"]]
            self._answer(
                {
                    "files": [
                        {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                    ]
                }
            )
        elif "/commit/main" in self.path:
            self._answer({"commitUrl": f"{self.server.url}/own/stack/commit/0", "commitOid": "0"})
        else:
            self._answer({}, 403)

    def do_GET(self):
        self._answer({"id": "own/stack", "sha": "0", "siblings": []})

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_finished_folder_is_pushed(land):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": "none", "HF_HOME": str(land / "hub")}
    out = land / "pushed"
    arguments = ["export", str(land / "stage1"), "--out", str(out), "--push", "own/stack"]
    command = [sys.executable, "-m", "mtllm_engine.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hub, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    created = json.loads(server.asked["/api/repos/create"])
    assert created["name"] == "stack" and "private" in created.values()
    (commit,) = (asked for path, asked in server.asked.items() if "/commit/" in path)
    lines = map(json.loads, commit.splitlines())
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_where_the_hub_refuses_the_folder_stays(land, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="cannot push to own/stack: no route; .* is complete"):
        export(land / "stage1", land / "kept", push="own/stack")
    assert find_trained(land / "kept").is_exported
