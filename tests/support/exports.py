"""Stacks of random values to export, what our engine reads with them, and cards' own programs."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from mtllm_engine.data.annotations import NO_ANNOTATIONS
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.export import Options
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.training.engine import shard
from mtllm_engine.training.trained import Trained, find_trained
from tests.support.adapters import write_adapters, write_projection
from tests.support.tiny import build_decoder, build_encoder, build_world, texts

LANGUAGES = ("swh_Latn", "eng_Latn")
TEXTS = [*texts(4), "", "</s> <pad> swh_Latn <|begin_of_text|>", "x"]
AS_STORED = Options()


def build_trained(folder: Path, *, bias: bool, causal: bool, **keys) -> Trained:
    """A checkpoint over `encoder` and `decoder` in a folder, read in fp32. Args: keys: of its
    adapters."""
    if not (folder / "encoder").is_dir():
        build_encoder(folder / "encoder", width=16, layers=1, samples=LANGUAGES)
        build_decoder(folder / "decoder", width=32, layers=2, attention_bias=True)
    student = folder / f"student-{bias}-{causal}"
    llm = LlamaModel.from_pretrained(folder / "decoder")
    write_adapters(student, llm, **{"r": 4, "lora_alpha": 6} | keys)
    write_projection(student, 32, 16)
    if not bias:
        path = student / "projection.safetensors"
        save_file({"weight": load_file(path)["weight"]}, path)
    return read_trained(folder, student, bias=bias, causal=causal)


def read_trained(folder: Path, student: Path, *, bias: bool, causal: bool) -> Trained:
    models = {key: str(folder / key) for key in ("encoder", "decoder")}
    trained = find_trained(student, **models)
    kept = {"dtype": "float32", "projection_bias": bias, "causal": causal}
    config = replace(trained.config, model=replace(trained.config.model, **kept))
    return replace(trained, config=replace(config, data=replace(config.data, max_length=64)))


@torch.no_grad()
def our_vectors(trained: Trained, texts: Sequence[str], language: str) -> np.ndarray:
    """fp32 (N, D)."""
    world, documents = build_world(), []
    stack, weights = build_stack(trained.config, learns=False)
    stack = shard(stack, weights, trained.config, world).eval()
    tokenizer = build_tokenizer(trained.config, stack)
    for number, text in enumerate(texts):
        read, _ = tokenizer.example(text, language, NO_ANNOTATIONS)
        ids = {"student_ids_S": read.ids_S, "teacher_ids_T": read.ids_S}
        documents.append(Document(key=str(number), seed=0, parts_Q2=read.parts_Q2, **ids))
    batch = collate(documents, step_seed=0, device=world.device)
    stream = stack.decoder.stream(batch.student, adapters="student", grad=False)
    (hidden_SD,) = stack.decoder(stack._hidden(batch, teaches=False), [stream])
    return stack.objective.pool(hidden_SD, batch.student_spans).numpy()


def assert_same(ours_ND: np.ndarray, theirs_ND: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours_ND.shape == theirs_ND.shape
    assert np.abs(ours_ND - theirs_ND).max() <= tolerance * np.abs(ours_ND).max()


def program_of(card: Path) -> str:
    """The first that a card shows."""
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def run_alone(program: str, folder: Path, **inputs: Path) -> None:
    """Runs a program in a folder, in a process that has no package of ours."""
    alone = "import sys; sys.modules['mtllm_engine'] = None\n"
    command = [sys.executable, "-I", "-c", alone + program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
