"""The exported folder in sentence-transformers, where our package is not."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mtllm_engine import MTLLM
from mtllm_engine.export import export
from tests.support.encoders import build_padded_encoder
from tests.support.exported import AWKWARD, run_without_us, write_stack
from tests.support.tiny import build_decoder, build_encoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")
LIBRARY = Path(sys.prefix, "sentence-transformers")  # the Makefile puts it there
needs_library = pytest.mark.skipif(not LIBRARY.is_dir(), reason="needs sentence-transformers 6")

TEXTS = [*AWKWARD, *texts(6, seed=5)]
CASES = {
    "plain": {},
    "sentences": {"model": {"causal": True}, "data": {"parts": "sentences"}},
    "taught": {"has_task": True, "bias": False},
    "untold": {"model": {"encoder_prefix": "passage: "}},
}
READ = """
from sentence_transformers import SentenceTransformer

def said(model, **options):
    try:
        model.encode(["a"], **options)
    except ValueError as error:
        return str(error)

for name, folder in jobs["folders"].items():
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    for language in jobs["languages"]:
        results[f"{name}/{language}"] = model.encode(jobs["texts"], language=language, batch_size=4)
    results[f"{name}/several"] = said(model, language=["swh_Latn"])
    results[f"{name}/unknown"] = said(model, language="swh") or ""
    results[f"{name}/missing"] = said(model) if name == "plain" else ""
    results[f"{name}/default"] = model.encode(jobs["texts"]) if name != "plain" else np.zeros(0)
    results[f"{name}/width"] = model.get_embedding_dimension()
"""


@needs_library
def test_sentence_transformers_gives_our_vectors(tmp_path):
    build_encoder(tmp_path / "encoder")
    build_decoder(tmp_path / "decoder")
    untold = tmp_path / "e5-small"
    build_padded_encoder(untold, "e5-small", hidden_size=32, max_position_embeddings=80)
    languages, folders, expected = ["swh_Latn", "zho_Hans"], {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        if name == "untold":
            case = {"model": case["model"] | {"encoder": str(untold)}}
        stack = write_stack(tmp_path, name, seed=number, **case)
        default = "" if name in ("plain", "untold") else "zho_Hans"
        folders[name] = str(export(stack, tmp_path / f"{name}-out", default_language=default))
        model = MTLLM.from_pretrained(stack)
        expected |= {f"{name}/{code}": model.encode(TEXTS, code) for code in languages}
        if name != "plain":
            expected[f"{name}/default"] = expected[f"{name}/zho_Hans"]
    options = {"folders": folders, "languages": languages, "texts": TEXTS}
    results = run_without_us(READ, tmp_path, path=str(LIBRARY), **options)
    for key, vectors in expected.items():
        assert results[key].shape == vectors.shape
        assert np.abs(results[key] - vectors).max() <= 1e-5 * np.abs(vectors).max(), key
    for name in CASES:
        assert "one language" in str(results[f"{name}/several"])
        if name != "untold":
            assert str(results[f"{name}/unknown"]).startswith("unknown language 'swh'; did you me")
        assert results[f"{name}/width"] == 48
    assert str(results["plain/missing"]).startswith("say the language of the texts")
