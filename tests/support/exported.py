"""Stacks of random values in every shape, and what is exported read where our package is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaModel

from mtllm_engine import config as configs
from tests.support.adapters import write_adapters
from tests.support.tiny import build_config

AWKWARD = [
    "a </s> in <pad> the <s>middle of swh_Latn a text",
    "",
    "  \n ",
    "One line. And a Sentence!\n\nAnother line, of a text\nin three. Lines",
    "word " * 90,
    "x" * 300,
    "Ünïcödé 漢字 ไทย",
]


def write_stack(
    folder: Path,
    name: str,
    *,
    bias: bool = True,
    has_task: bool = False,
    seed: int = 0,
    llm: str = "decoder",
    **sections: dict[str, Any],
) -> Path:
    """A checkpoint of random values in a run of its own, over `encoder` and `decoder` of a folder.

    Args:
        has_task: As after stage 2: a head, and a fine-tuned LLM (`NAME-teacher`) that was learned
            from.
    """
    run, model = folder / name, sections.pop("model", {})
    checkpoint = run / "checkpoints" / "one"
    decoder = LlamaModel.from_pretrained(folder / llm)
    generator = torch.Generator().manual_seed(seed + 7)
    projection = {"weight": torch.randn(48, 32, generator=generator) / 4}
    if bias:
        projection["bias"] = torch.randn(48, generator=generator)
    rank = {"r": 3, "lora_alpha": 5.0}
    write_adapters(checkpoint, decoder, seed=seed, **rank)
    save_file(projection, checkpoint / "projection.safetensors")
    model |= {"projection_bias": bias, "decoder": str(folder / llm)}
    if has_task:
        teacher = folder / f"{name}-teacher"
        write_adapters(teacher, decoder, seed=seed + 1, **rank)
        for each in (checkpoint, teacher):
            head = {"head.weight": torch.randn(7, 48, generator=generator)}
            save_file(head, each / "head.safetensors")
        model["teacher"] = str(teacher)
    lora = {"rank": 3, "alpha": 5.0}
    options = {"run": {"dir": str(run)}, "model": model, "lora": lora} | sections
    (run / "config.toml").write_text(configs.dumps(build_config(folder, **options)))
    return checkpoint


def write_task(folder: Path, outputs: int, *, seed: int = 5, **keys: Any) -> Path:
    """A fine-tuned LLM of random values, as PEFT saves it, with a head."""
    decoder = LlamaModel.from_pretrained(folder.parent / "decoder")
    write_adapters(folder, decoder, seed=seed, **{"r": 2, "lora_alpha": 4.0} | keys)
    generator = torch.Generator().manual_seed(seed)
    head = {"head.weight": torch.randn(outputs, 48, generator=generator)}
    save_file(head, folder / "head.safetensors")
    return folder


WORKER = """
import json, sys
sys.modules["mtllm_engine"] = None  # as where it is not installed
import numpy as np, torch
torch.set_num_threads(1)
{program}
assert sys.modules["mtllm_engine"] is None
"""


def run_without_us(program: str, folder: Path, *, path: str = "", **options: Any) -> dict:
    """What a program leaves in `results` in a process without our package.

    Args:
        program: Its variables: `jobs`, the options, and `results`, arrays by name.
        folder: Where it runs.
        path: Where further packages lie.
    """
    (folder / "jobs.json").write_text(json.dumps(options))
    reads = "jobs, results = json.load(open('jobs.json')), {}"
    writes = "np.savez('results.npz', **results)"
    script = WORKER.format(program="\n".join([reads, program, writes]))
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        **{"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "results.npz", allow_pickle=False) as loaded:
        return dict(loaded)
