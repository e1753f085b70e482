"""The plan's estimates grow as they must. Its bytes are those that ranks send and hold:
tests/training/test_zero.py."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models import DECODERS, ENCODERS
from mtllm_engine.config import Config
from mtllm_engine.model.families import decoder_spec
from mtllm_engine.model.stack import Stack
from mtllm_engine.training import cost, memory
from mtllm_engine.training.cost import Step, Texts
from mtllm_engine.training.gpus import GPUS, Cluster, find_gpu, gpu_of
from mtllm_engine.training.memory import Models
from mtllm_engine.training.traffic import movements
from tests.support.tiny import build_config

RANKS = (1, 2, 3, 8, 64)
TEXTS = Texts(90, 70)


def test_whole_weights_send_the_gradients_alone():
    drawn = {"stage": 0, "quantization": "none", "max_tokens": 512, "layers": 2}
    config, models = tiny(**drawn, recompute="cheap")
    trained = sum(each.numel() for each in models.stack.parameters() if each.requires_grad)
    for ranks in (1, 2, 3):
        (moved,) = movements(config, models, Cluster(gpu=GPUS["h100"], gpus=ranks), 5)
        assert (moved.kind, moved.bytes) == ("reduced", 4 * trained * 2 * (ranks - 1) // ranks)


SPEC = decoder_spec(DECODERS["tiny"])
SETTINGS = st.fixed_dictionaries(
    {
        "stage": st.sampled_from([0, 3]),
        "quantization": st.sampled_from(["none", "fp8", "nf4"]),
        "recompute": st.sampled_from(["cheap", "mlp", "layer"]),
        "max_tokens": st.integers(512, 9000),
        "layers": st.integers(1, 5),
        "gpus": st.sampled_from(RANKS),
        "nodes": st.integers(1, 2),
    }
)


def tiny(**drawn) -> tuple[Config, Models]:
    """A configuration of tiny models with so many layers."""
    config = build_config(
        Path("nowhere"),
        model={"dtype": "bfloat16"},
        data={"lanes": 128, "pack_documents": 4, "max_length": 128},
        memory={key: drawn[key] for key in ("max_tokens", "recompute")},
    )
    model = replace(config.model, quantization=drawn["quantization"])
    config = replace(config, model=model, zero=replace(config.zero, stage=drawn["stage"]))
    count = drawn["layers"]
    decoder = dataclasses.replace(SPEC, num_layers=count, rope_of=SPEC.rope_of[:1] * count)
    with torch.device("meta"):
        stack = Stack(config, ENCODERS["tiny"], decoder)
    return config, Models(encoder=ENCODERS["tiny"], decoder=decoder, stack=stack)


def estimated(**drawn) -> tuple[int, Step]:
    """Bytes and the step."""
    config, models = tiny(**drawn)
    cluster = Cluster(gpu=GPUS["h100"], gpus=drawn["gpus"], nodes=drawn["nodes"])
    rows = memory.rows(config, models, cluster.size)
    work = cost.work_of(config, TEXTS, cluster.size)
    return memory.total(rows), cost.predict(config, models, cluster, work)


@settings(max_examples=12)
@given(SETTINGS, st.sampled_from(["max_tokens", "layers"]), st.integers(1, 4))
def test_more_tokens_and_layers_never_need_less(drawn: dict, key: str, times: int):
    more = drawn | {key: times * drawn[key]}
    before, after = estimated(**drawn), estimated(**more)
    assert after[0] >= before[0]
    if key == "layers":
        assert after[1].seconds >= before[1].seconds
        assert after[1].traffic.gathered >= before[1].traffic.gathered
    else:  # larger micro-batches do the same work in fewer turns
        assert after[1].work.micro_batches <= before[1].work.micro_batches
        assert after[1].traffic.gathered <= before[1].traffic.gathered


@settings(max_examples=12)
@given(SETTINGS, st.sampled_from(RANKS))
def test_more_gpus_never_need_more_memory_each_nor_do_more_work(drawn: dict, gpus: int):
    few, many = (drawn | {"gpus": count} for count in sorted((drawn["gpus"], gpus)))
    (before, one), (after, other) = estimated(**few), estimated(**many)
    assert after <= before
    assert other.work.student <= one.work.student
    assert sum(other.parts.values()) <= sum(one.parts.values()) * (1 + 1e-9)
    assert other.pairs == pytest.approx(one.pairs)  # a step's, over all ranks


@settings(max_examples=12)
@given(SETTINGS)
def test_a_step_is_the_sum_of_what_bounds_it(drawn: dict):
    _, step = estimated(**drawn)
    assert step.seconds >= sum(step.parts.values()) * (1 - 1e-9)
    assert step.seconds == pytest.approx(sum(step.bounds.values())) and 0 < step.mfu < 1
    if drawn["gpus"] * drawn["nodes"] == 1:
        assert not any(step.traffic) and "network" not in step.bounds


@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_what_is_computed_again_takes_time(kind: str):
    drawn = {"stage": 0, "quantization": "none", "max_tokens": 4096, "layers": 4}
    drawn |= {"gpus": 1, "nodes": 1}
    saved, again = (estimated(**drawn, recompute=each) for each in ("cheap", kind))
    assert again[0] < saved[0] and again[1].parts["backward"] > saved[1].parts["backward"]


def test_a_slow_network_bounds_what_is_gathered_over_it():
    drawn = {"stage": 3, "quantization": "none", "max_tokens": 512, "layers": 4}
    config, models = tiny(**drawn, recompute="cheap")
    cluster = Cluster(gpu=GPUS["4090"]._replace(network_gbytes_per_s=1e-3), gpus=2, nodes=2)
    work = cost.work_of(config, TEXTS, cluster.size)
    plain = cost.predict(config, models, cluster, work)
    copied = cost.predict(config, models, cluster, work, has_copies=True)
    assert plain.bound.startswith("network") and copied.seconds < plain.seconds / 2
    assert 0 < copied.traffic.gathered < plain.traffic.gathered


def test_unknown_gpus_are_refused_and_those_here_are_known():
    with pytest.raises(ValueError, match="--gpu h300: there is no such GPU; choose one of a100-40"):
        find_gpu("h300")
    seen = {("NVIDIA A100-SXM4-40GB", 42e9): "a100-40", ("NVIDIA A100 80GB PCIe", 85e9): "a100-80"}
    seen |= {("NVIDIA H200", 150e9): "h200", ("NVIDIA GeForce RTX 4090", 25.3e9): "4090"}
    seen |= {("NVIDIA GeForce RTX 3090", 25.3e9): None}
    assert {each: gpu_of(*each) for each in seen} == seen


def test_packs_are_filled_as_the_stream_fills_them():
    config = build_config(Path("nowhere"), data={"lanes": 7, "pack_documents": 2})
    work = cost.work_of(config, Texts(30, 15), 2)  # 4 packs of 60 tokens, 160 in a micro-batch
    assert work == (4, 2, 8, 240, 120)
    data = replace(config.data, pack_documents=0, pack_tokens=100)
    packed = cost.work_of(replace(config, data=data), Texts(20, 20), 1)
    assert packed.packs == 7 and packed.student == pytest.approx(7 * 90)


def test_a_step_that_is_there_is_shared_out():
    config = build_config(Path("nowhere"), data={"lanes": 8, "pack_documents": 2})
    totals = SimpleNamespace(documents=16)
    batch = SimpleNamespace(
        totals=totals, student_tokens=800, teacher_tokens=400, micro_batches=[[], []]
    )
    assert cost.work_of_batch(config, batch, 3) == (3, 2, 6, 300, 150)
