"""Several ranks under an encoder that is whole on each of them, against plain PyTorch on one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtllm_engine.train import train
from tests.support.encoders import build_under_nllb
from tests.support.machine import launch
from tests.support.stages import ALONE, losses
from tests.support.tiny import build_corpus, build_decoder
from tests.support.zero_worker import padded_config
from tests.training.test_zero import WORKER, results

SIZES = [1, 3]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    """An XLM-R with NLLB's tokenizer, an LLM, a corpus, and runs of plain PyTorch and of both
    worlds."""
    folder = tmp_path_factory.mktemp("encoders")
    build_under_nllb(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 60)
    train(padded_config(folder, "padded_0", stage=0), ALONE)
    for size in SIZES:
        launch(size, WORKER, folder, "padded_encoder")
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("end", ["", "_whole"])
def test_any_number_of_ranks_trains_as_plain_pytorch_does(worlds: Path, size: int, end: str):
    """From a projection that all of them solved for, whether the LLM is sharded or whole."""
    expected = losses(worlds / "padded_0")
    assert losses(worlds / f"padded_{size}{end}") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == len(set(expected)) == 3


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_reads_the_encoder_once_and_its_share_of_the_llm(worlds: Path, size: int):
    """Of the LLM's embeddings also what the projection is solved for with."""
    reads = [result["read"] for result in results(worlds, "padded_encoder", size)]
    for side, times in (("encoder", size), ("decoder", 1)):
        for name, tensor in load_file(worlds / side / "model.safetensors").items():
            if name.startswith(("lm_head", "pooler")):
                assert not any(f"{side}/{name}" in read for read in reads)
            elif name != "model.embed_tokens.weight":
                counts = [read.get(f"{side}/{name}", 0) for read in reads]
                assert sum(counts) == times * tensor.numel(), name
                assert side == "decoder" or len(set(counts)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_an_encoder_makes_no_collective(worlds: Path, size: int):
    for result in results(worlds, "padded_encoder", size):
        with_it, without_it = result["collectives"]
        assert with_it == without_it
        assert any("reduce_scatter" in name for name in with_it)
