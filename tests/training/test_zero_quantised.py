"""Quantised weights under ZeRO-3 as on one rank; frozen weights that each machine holds once more.

Of four ranks, each two are a machine. The LLM under NF4 has widths that make slices with padding;
fp8 takes multiples of 16 only.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from mtllm_engine.kernels.lora_linear import Quantised
from mtllm_engine.kernels.lora_linear.quantised import GATHERED

from mtllm_engine.model.build import build_stack
from mtllm_engine.model.lora import quantised_weights
from mtllm_engine.training import engine as engines
from mtllm_engine.training.engine import shard
from tests.support.machine import launch
from tests.support.stages import ALONE, rows
from tests.support.tiny import build_corpus, build_decoder, build_encoder, build_world
from tests.support.zero_worker import QUANTISED, TWOFOLD, quantised_config, run

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    """Models, corpora, eight steps of each kind on one rank, copied after two; four ranks have run
    their scenario, which goes on with the copy."""
    folder = tmp_path_factory.mktemp("zero_quantised")
    build_encoder(folder / "encoder", layers=1)
    build_decoder(folder / "decoder", width=64, layers=2)
    build_decoder(folder / "odd", width=40, layers=2)
    build_corpus(folder / "train", 40)
    build_corpus(folder / "held_out", 7, seed=1)
    for kind in QUANTISED:
        config = quantised_config(folder, f"{kind}_0", kind, stage=0)
        run(config, ALONE, stop_at=2)
        shutil.copytree(config.run.dir, folder / f"{kind}_exchanged", symlinks=True)
        run(config, ALONE)
    launch(4, "tests.support.zero_worker", folder, "quantised", local_size=2)
    return folder


def results(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("quantised_4_*.json"))
    assert len(paths) == 4
    return [json.loads(path.read_text()) for path in paths]


def alone(folder: Path, kind: str) -> list[Quantised]:
    """The weights as one rank holds them."""
    config = quantised_config(folder, "alone", kind, stage=0)
    stack, weights = build_stack(config)
    return quantised_weights(shard(stack, weights, config, ALONE))


@pytest.mark.parametrize("kind", QUANTISED)
def test_any_number_of_ranks_trains_as_one_does(worlds: Path, kind: str):
    """Two steps by one rank, two by four, sharded, two by four that hold all of it, two by one."""
    run(quantised_config(worlds, f"{kind}_exchanged", kind, stage=0), ALONE)
    found, wanted = (rows(worlds / f"{kind}_{name}") for name in ("exchanged", "0"))
    assert len(found) == len(wanted) == 12  # eight steps, four validations
    # A sum's last bit may be what decides to which of two neighbours in e4m3 a number goes.
    rel = 1e-5 if kind == "nf4" else 1e-4
    for ours, theirs in zip(found, wanted):
        for key in theirs.keys() & {"step", "loss", "validation_fvu"}:
            assert ours[key] == pytest.approx(theirs[key], rel=rel), key
    assert len({row["loss"] for row in wanted if "loss" in row}) == 8


@pytest.mark.parametrize("kind", QUANTISED)
def test_ranks_hold_the_bits_that_one_holds(worlds: Path, kind: str):
    payloads = [weight.payload.numpy().tobytes() for weight in alone(worlds, kind)]
    expected = [hashlib.sha256(payload).hexdigest() for payload in payloads]
    assert len(expected) == len(set(expected)) == 8
    digests = [seen[f"{kind} none"]["digests"] for seen in results(worlds)]
    assert digests == [expected] * 4


@pytest.mark.parametrize("kind", QUANTISED)
def test_payloads_are_gathered_twice_a_micro_batch_and_kept_by_nothing(worlds: Path, kind: str):
    held = alone(worlds, kind)
    sizes = [weight.payload.numel() for weight in held]
    assert any(size % 4 for size in sizes) == (kind == "nf4")  # of which slices have padding
    for seen in (result[f"{kind} none"] for result in results(worlds)):
        # Once more to look at them.
        gathered = seen["bytes"]["uint8 of 4"] / (seen["passes"] + 1)
        assert gathered == sum(-(-size // 4) * 4 for size in sizes)
        # Scales of rows, or a mean and a scale of scales, weigh more in weights so small.
        per_weight = gathered / sum(weight.shape.numel() for weight in held)
        assert 0 < per_weight - GATHERED[kind] < (0.01 if kind == "nf4" else 4 / 64 + 0.01)
        assert seen["passes"] > 6 and set(seen["kept"]) == {0}


@pytest.mark.parametrize("kind", TWOFOLD)
def test_weights_on_each_machine_change_no_bit(worlds: Path, kind: str):
    for seen in results(worlds):
        assert seen[f"{kind} node"]["losses"] == seen[f"{kind} none"]["losses"]


@pytest.mark.parametrize("kind", TWOFOLD)
def test_frozen_weights_stay_on_their_machine(worlds: Path, kind: str):
    """Once it has read them."""
    frozen = "bfloat16" if kind == "none" else "uint8"
    held = [] if kind == "none" else alone(worlds, kind)
    looked_at = sum(-(-weight.payload.numel() // 4) * 4 for weight in held)
    for seen in results(worlds):
        node, spread = seen[f"{kind} node"]["bytes"], seen[f"{kind} none"]["bytes"]
        assert node.get(f"{frozen} of 4", 0) == looked_at
        assert node[f"{frozen} of 2"] == spread[f"{frozen} of 4"] - looked_at > 0
        assert not any("of 2" in key for key in spread)


def test_machines_that_cannot_hold_them_are_told(worlds: Path, capsys):
    key = 'zero.secondary="node"'
    for seen in results(worlds):
        assert seen["refused"] == [
            f"{key}: each machine has one rank, which would hold all of it; set zero.stage=0",
            f"{key}: machines run 2, 3 of 4 ranks, and must run equally many; "
            'set zero.secondary="none"',
        ]
    config = quantised_config(worlds, "alone", "none", stage=3, secondary="node")
    engines._check_nodes(config, build_world())
    assert f"{key} changes nothing: all ranks are on one machine" in capsys.readouterr().err
    with pytest.raises(ValueError, match="zero.secondary='node' is for zero.stage=3"):
        quantised_config(worlds, "alone", "none", stage=0, secondary="node")
