"""What the README says of Python runs as it stands there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from mtllm_engine.tasks.sib200 import LABELS
from tests.support.adapters import write_run
from tests.support.machine import ROOT
from tests.support.tiny import build_config, build_decoder, build_encoder

LINES = re.compile(r"## Use it\n\n```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```\n", re.DOTALL)


def test_the_lines_of_python_print_what_stands_below_them(tmp_path: Path):
    """On a stack of the quickstart's shape and random values: its labels are its own."""
    (lines, printed) = LINES.search((ROOT / "README.md").read_text("utf-8")).groups()
    build_encoder(tmp_path / "encoder", vocab_size=1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    tokenizer.add_tokens(["qaa_Latn"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "encoder")
    build_decoder(tmp_path / "decoder", width=128)
    run = {"dir": str(tmp_path / "runs" / "quickstart" / "run" / "stage2-0")}
    write_run(build_config(tmp_path, run=run, task={"name": "sib200"}), outputs=7, seed=1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", lines]
    options = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr
    (shape, labels), (said_shape, said_labels) = (
        map(ast.literal_eval, each.splitlines()) for each in (result.stdout, printed)
    )
    assert shape == said_shape and len(labels) == len(said_labels)
    assert {*labels, *said_labels} <= {*LABELS}
