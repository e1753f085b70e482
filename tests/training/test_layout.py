"""Which layout "auto" is, and the words that a header has for it; more ranks than GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtllm_engine.config import Config, dumps, load
from mtllm_engine.model.build import read_models
from mtllm_engine.training.launch import launcher, tell
from mtllm_engine.training.layout import (
    SHARDED,
    WHOLE,
    Layout,
    choose,
    needed_bytes,
    settle,
    settled,
)
from mtllm_engine.world import World, check_gpus, connect
from tests.support.tiny import build_config, build_decoder, build_encoder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("layout")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    # By itself DeepSpeed keeps more than such models have.
    zero = {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 1}
    zero |= {"stage3_param_persistence_threshold": 1}
    return build_config(folder, zero={"stage": "auto"}, deepspeed={"zero_optimization": zero})


def chosen(config: Config, world_size: int, sizes: list[int]) -> Layout:
    return choose(config, world_size, sizes, lambda stage: needed(config, stage, world_size))


def needed(config: Config, stage: int, world_size: int) -> int:
    return needed_bytes(config, stage, *read_models(config.model), world_size)


@pytest.mark.parametrize("world_size", [2, 8])
def test_weights_are_whole_where_they_fit_to_the_byte(config: Config, world_size: int):
    whole, sharded = (needed(config, stage, world_size) for stage in (WHOLE, SHARDED))
    assert sharded < whole
    fits, tight = (chosen(config, world_size, [size] * world_size) for size in (whole, whole - 1))
    assert fits.stage == WHOLE and tight.stage == SHARDED
    there = f"whole takes an estimated {whole / 1e9:.1f} GB of {whole / 1e9:.1f}"
    assert fits.words.startswith(f"whole on each of {world_size} GPUs (zero.stage=auto: {there})")
    assert f"sharded over {world_size} GPUs" in tight.words
    assert tight.words.endswith(f"{there}, sharded {sharded / 1e9:.1f} GB)")


def test_of_mixed_cards_the_smallest_counts_and_is_told(config: Config):
    whole = needed(config, WHOLE, 2)
    mixed = chosen(config, 2, [80_000_000_000, whole - 1])
    assert mixed.stage == SHARDED
    assert "the least of these GPUs, which have up to 80.0" in mixed.words
    assert "least" not in chosen(config, 2, [whole, whole]).words


def test_one_gpu_shares_with_nobody(config: Config):
    layout = chosen(config, 1, [1000])
    assert layout.stage == WHOLE
    assert layout.words.startswith("whole on 1 GPU (") and "may not fit)" in layout.words
    assert chosen(config, 2, [1000, 1000]).words.endswith("may not fit)")


@pytest.mark.parametrize("world_size", [1, 3])
def test_cpu_ranks_shard(config: Config, world_size: int):
    layout = chosen(config, world_size, [])
    assert layout.stage == SHARDED and layout.words.endswith("(zero.stage=auto on CPUs)")


@pytest.mark.parametrize("sizes", [[], [1, 1]])
@pytest.mark.parametrize("stage", [WHOLE, SHARDED])
def test_what_is_asked_for_is_done(config: Config, stage: int, sizes: list[int]):
    asked = replace(config, zero=replace(config.zero, stage=stage))
    layout = chosen(asked, 2, sizes)
    assert layout.stage == stage and f" (zero.stage={stage})" in layout.words


def test_a_table_of_deepspeeds_that_is_not_read_is_told(config: Config):
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    whole = replace(config, zero=replace(config.zero, stage=WHOLE))
    words = "whole on 1 CPU rank (zero.stage=0)"
    assert settle(whole, alone) == (whole, f"{words}; [deepspeed] has no effect")
    plain = replace(whole, deepspeed={})
    assert settle(plain, alone) == (plain, words)
    settled, words = settle(config, alone)
    assert settled.zero.stage == SHARDED and "no effect" not in words


@pytest.mark.parametrize("stage", [WHOLE, SHARDED])
def test_what_was_decided_can_be_read_again(config: Config, tmp_path: Path, stage: int):
    asked = replace(config, zero=replace(config.zero, secondary="node"))
    decided = settled(asked, stage)
    (tmp_path / "config.toml").write_text(dumps(decided))
    assert load(tmp_path / "config.toml") == decided
    assert decided.zero.secondary == ("node" if stage == SHARDED else "none")
    words = chosen(asked, 2, [80_000_000_000] * 2).words
    assert words.endswith("; [deepspeed] has no effect; zero.secondary has no effect")


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch, tmp_path: Path):
    check_gpus(9)  # on CPUs any number
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there, words in ((1, "there is one"), (2, "there are 2")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        check_gpus(there)
        message = f"3 ranks need a GPU each, and {words}: use --gpus {there}"
        for ask in (lambda: check_gpus(3), lambda: launcher("mtllm_engine.train", 3)):
            with pytest.raises(ValueError, match=f"^{message}$"):
                ask()


@pytest.mark.parametrize("rank", [0, 8, 9])
def test_each_machine_says_that_it_has_too_few_gpus(rank: int, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"RANK": rank, "WORLD_SIZE": 16, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": 8}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="8 ranks need a GPU each") as refusal:
        connect()
    tell(refusal.value, "mtllm", None)
    assert len(capsys.readouterr().err.splitlines()) == (rank % 8 == 0)


def test_ranks_that_were_started_by_hand_may_be_on_any_machines(monkeypatch):
    def taken(device: torch.device) -> None:
        raise LookupError(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LookupError, match="cuda:0"):
        connect()
