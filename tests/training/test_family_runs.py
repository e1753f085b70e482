"""LLMs of several families through stage 1, their vectors, and their exported folders, which open
where our package is not.
"""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mtllm_engine import MTLLM
from mtllm_engine.config import Config
from mtllm_engine.data.annotations import NO_ANNOTATIONS
from mtllm_engine.export import export
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.train import train
from tests.support.exported import run_without_us
from tests.support.families import build_llm, linears_of, load_text_model
from tests.support.padded import Padded, mean_pool, pad
from tests.support.stages import ALONE, losses, rows, stage1_config
from tests.support.tiny import build_corpus, build_encoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma3", "phi3")
TEXTS = texts(5, seed=9)
LANGUAGE = "swh_Latn"
READ = """
from transformers import AutoModel
for name, folder in jobs["folders"].items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    results[name] = model.encode(**jobs["asked"])
"""


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory) -> Path:
    """Three steps of stage 1 over an LLM of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    build_encoder(folder / "encoder", width=16, layers=1, samples=[LANGUAGE])
    build_llm(folder / "decoder", request.param)
    build_corpus(folder / "train", 24)
    train(config_of(folder), ALONE)
    return folder / "stage1"


def config_of(folder: Path) -> Config:
    """What it learns from is looked at before and after: steps read different documents."""
    seen = {"corpus": str(folder / "train")}
    return stage1_config(folder, lora={"dropout": 0.0}, validation=seen)


@pytest.fixture(scope="module")
def vectors_ND(run: Path) -> np.ndarray:
    return MTLLM.from_pretrained(run).encode(TEXTS, LANGUAGE, progress=False)


def test_it_learns(run: Path):
    assert len(losses(run)) == 3
    before, after = (row["validation_fvu"] for row in rows(run) if "validation_fvu" in row)
    assert after < before


def test_peft_opens_a_checkpoint_of_it(run: Path, vectors_ND: np.ndarray):
    """Under the family's own names; vectors are those of a padded loop."""
    config, saved = config_of(run.parent), run / "checkpoints" / "latest"
    llm = load_text_model(config.model.decoder)
    llm.config.is_causal = False
    model = peft.PeftModel.from_pretrained(llm, saved)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == set(linears_of(llm.config))
    tensors = load_file(saved / "projection.safetensors")
    projection = nn.Linear(*reversed(tensors["weight"].shape))
    projection.load_state_dict(tensors)
    theirs_ND = padded_vectors(Padded(config, model, projection), config)
    assert np.abs(theirs_ND - vectors_ND).max() <= 1e-5 * np.abs(theirs_ND).max()


@torch.no_grad()
def padded_vectors(padded: Padded, config: Config) -> np.ndarray:
    tokenizer = build_tokenizer(config, build_stack(config)[0])
    read = [tokenizer.example(text, LANGUAGE, NO_ANNOTATIONS)[0].ids_S for text in TEXTS]
    ids_BL, real_BL = pad(read)
    states_BLD = padded.llm(
        inputs_embeds=padded.projected(ids_BL, real_BL),
        attention_mask=real_BL.long(),
        use_cache=False,
    ).last_hidden_state
    return mean_pool(states_BLD, real_BL).numpy()


def test_exported_folders_of_it_open_where_our_package_is_not(run: Path, vectors_ND: np.ndarray):
    folders = {
        "plain": export(run, run.parent / "plain"),
        "merged": export(run, run.parent / "merged", merge=True),
    }
    asked = {"texts": TEXTS, "language": LANGUAGE}
    paths = {name: str(folder) for name, folder in folders.items()}
    results = run_without_us(READ, run.parent, folders=paths, asked=asked)
    for name, folder in folders.items():
        ours_ND = MTLLM.from_pretrained(folder).encode(TEXTS, LANGUAGE, progress=False)
        for each_ND in (results[name], ours_ND):
            assert np.abs(each_ND - vectors_ND).max() <= 1e-5 * np.abs(vectors_ND).max(), name
