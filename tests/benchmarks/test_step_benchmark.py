"""The step benchmark at tiny sizes: its variants agree, its rows hold what they promise."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mtllm_engine.kernels.attention.reference import attention
from transformers import LlamaModel, M2M100Model

from benchmarks import baselines, documents, fair, models, profile, step
from mtllm_engine.config import dumps, load
from mtllm_engine.training.engine import build_engine
from tests.support.fake_slurm import install, submit
from tests.support.machine import need_fp8
from tests.support.tiny import (
    build_config,
    build_decoder,
    build_encoder,
    build_world,
    pack_lines,
    texts,
)

FIELDS = {
    *("variant", "data", "lengths", "device", "driver", "torch", "triton", "commit", "world_size"),
    *("zero_stage", "dtype", "quantization", "tolerance", "weights", "gemm_tflops", "gemm_share"),
    *("mfu", "pairs_per_s", "documents_per_s", "step_s", "error"),
}
INSIDE = {"split_s", "padding", "kernels", "step_bytes", "peak_bytes", "profile"}
DIRECTIONS = ("forward", "backward")
PARTS = {"encoder", "teacher", "student", "backward", "optimizer", "rest", "collectives"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    no_pad = [line for line in texts(80) if "<" not in line]
    pack_lines(folder / "train", no_pad, num_shards=2)
    (folder / "config.toml").write_text(dumps(build_config(folder, memory={"max_tokens": 256})))
    return folder


def bench(folder: Path, *arguments: str) -> tuple[int, list[dict]]:
    """Exit status and rows."""
    out = folder / "out" / "rows.jsonl"
    out.unlink(missing_ok=True)
    status = step.main([str(folder / "config.toml"), "--steps", "1", "--out", str(out), *arguments])
    lines = out.read_text().splitlines() if out.exists() else []
    return status, [json.loads(line) for line in lines]


def test_every_variant_agrees_and_has_its_row(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(fair, "SHARES", (4, 1))
    monkeypatch.setattr(fair, "STEPS", 1)
    traces = ["--profile", str(folder / "trace.json"), "--sweep"]
    status, rows = bench(folder, "--baseline", "all", "--lengths", "20,equal", *traces)
    assert status == 0
    check_sweep(rows)
    rows = [row for row in rows if row["data"] != "sweep"]
    variants = ["ours", "padded", "padded sorted"]
    assert [(row["lengths"], row["variant"]) for row in rows if row["data"] == "excluded"] == [
        (lengths, variant) for lengths in ("20", "equal") for variant in variants
    ]
    assert [row["variant"] for row in rows if row["data"] == "included"] == ["ours", "padded"]
    for row in rows:
        assert row.keys() >= FIELDS and row["error"] < 1e-5 and row["pairs_per_s"]["median"] > 0
        if row["data"] == "excluded":
            assert row.keys() >= INSIDE and row["split_s"].keys() == PARTS
            assert row["kernels"] > 100 and row["peak_bytes"] > row["step_bytes"] > 0
            assert min(row["split_s"][part] for part in PARTS - {"rest", "collectives"}) > 0
            check_profile(row)
        else:
            assert 0 <= row["data_wait_s"]["median"] < row["step_s"]["median"]
    assert (folder / "out" / "rows.png").stat().st_size > 10_000
    for name in ("trace", "trace-padded", "trace-padded-sorted"):
        assert json.loads((folder / f"{name}.json").read_text())["traceEvents"]
    printed = capsys.readouterr().out
    assert "unpadded: skipped" in printed and "what suits each of the others" in printed
    assert profile.main([str(folder / "out" / "rows.jsonl"), "--out", str(folder / "p.md")]) == 0
    text = (folder / "p.md").read_text()
    assert text.count("| kind | ms |") == 6 and "| frozen products backward |" in text


def check_profile(row: dict):
    """What every step is made of is in it; what ours must do at least was counted."""
    kinds = {(each["kind"], each["pass"]): each for each in row["profile"]}
    passes = [(kind, direction) for kind in ("attention", "adapters") for direction in DIRECTIONS]
    linears = "frozen products" if row["variant"] == "ours" else "other products"
    assert kinds.keys() >= {(linears, direction) for direction in DIRECTIONS} | set(passes)
    assert all(each["s"] > 0 for each in kinds.values())
    bound = {key for key, each in kinds.items() if each["least_s"]}
    if row["variant"] != "ours":
        assert not bound
        return
    ours = {*profile.OPS.values(), profile.ADAPTERS} - {"projection"}  # ours on a GPU alone
    assert bound == {(kind, direction) for kind in ours for direction in DIRECTIONS}
    assert kinds[linears, "forward"]["least_s"] > kinds[linears, "backward"]["least_s"] > 0


def check_sweep(rows: list[dict]):
    """Each baseline ran at the best of what was tried for it."""
    names = ("batch", "checkpointing", "compiled")
    for row in rows:
        if row["data"] != "excluded" or row["variant"] == "ours":
            continue
        tried = [
            each
            for each in rows
            if [each[key] for key in ("data", "lengths", "variant")]
            == ["sweep", row["lengths"], row["variant"]]
        ]
        settings = [tuple(each[name] for name in names) for each in tried]
        largest = 4 if row["lengths"] == "equal" else 16  # holds all of a step's documents
        plain = [(size, False, False) for size in (largest // 4, largest)]
        assert settings[:2] == plain and (largest, True, False) in settings
        best = max(tried, key=lambda each: each["pairs_per_s"])
        assert [row[name] for name in names] == [best[name] for name in names]


class Stand:
    """A baseline that runs out of memory above a batch, and does not compile."""

    def __init__(self, most: int) -> None:
        self.name, self.packed, self.most, self.batch = "unpadded", True, most, 0
        self.checkpointing = self.compiled = False
        self.module = torch.nn.Linear(1, 1)

    def run(self, global_batch) -> None:
        if self.compiled:
            raise RuntimeError("no such kernel\nand more")
        if self.batch > self.most * (1 + self.checkpointing):
            raise torch.OutOfMemoryError


def test_what_does_not_fit_or_compile_is_said_and_is_not_the_best(monkeypatch):
    batch = SimpleNamespace(micro_batches=[[1, 2]])
    gpu = SimpleNamespace(size=1, device=torch.device("cuda"), gather=lambda x: [x])
    monkeypatch.setattr(fair.measure, "timed", lambda run, _: (run(), 1 / stand.batch))
    stand = Stand(most=300)
    rows = list(fair.sweep(stand, [batch] * 3, 1024, gpu))
    said = {(row["batch"], row["checkpointing"], row["compiled"]): row["status"] for row in rows}
    assert said[256, False, False] == said[512, True, False] == "ok"
    assert said[512, False, False] == said[1024, True, False] == "out of memory"
    assert said[256, False, True] == "RuntimeError: no such kernel"
    assert (stand.batch, stand.checkpointing, stand.compiled) == (512, True, False)
    with pytest.raises(ValueError, match="unpadded runs in no setting: RuntimeError"):
        list(fair.sweep(Stand(most=1), [batch] * 3, 1024, gpu))


def test_kernels_of_a_gpu_count_for_what_launched_them():
    """The innermost name decides; what a linear launches beside its products is its adapters'."""

    def event(name: str, around=None, shapes=(), *kernels_us: float):
        launched = [
            SimpleNamespace(duration=taken_us, name="_quantise_rows" if taken_us > 50 else "any")
            for taken_us in kernels_us
        ]
        about = {"name": name, "cpu_parent": around, "input_shapes": list(shapes)}
        return SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, kernels=launched, **about)

    linear = event("_LoraLinear", None, (), 3.0, 51.0)
    engine = event("autograd::engine::evaluate_function: _LoraLinearBackward")
    backward = event("_LoraLinearBackward", engine)
    again = event("_RmsNorm", backward, (), 5.0)
    wide, thin = ((64, 512), (512, 768)), ((64, 512), (512, 16))
    varlen = event("torch_attn::_varlen_attn")
    events = [
        *(linear, engine, backward, again, varlen),
        event("aten::addmm_", linear, ((64, 768), *wide), 7.0),
        event("aten::mm", linear, thin, 1.0, 1.0),
        event("aten::mm", backward, wide, 11.0),
        event("aten::_flash_attention_forward", varlen, (), 13.0),
        event("aten::copy_", None, (), 17.0),
        event("aten::exp", None, (), 19.0),
        event("aten::mm", None, wide, 23.0),
    ]
    kinds = profile.by_kind(events, on_gpu=True, rank=16)
    found = {key: (round(1e6 * each["s"]), each["count"]) for key, each in kinds.items()}
    assert found == {
        ("frozen products", "forward"): (7, 1),
        ("adapters", "forward"): (5, 3),
        ("quantising", "forward"): (51, 1),
        ("frozen products", "backward"): (11, 1),
        ("norms", "backward"): (5, 1),
        ("attention", "forward"): (13, 1),
        ("copies", "forward"): (17, 1),
        ("other", "forward"): (19, 1),
        ("other products", "forward"): (23, 1),
    }
    idle = profile.rows(kinds, {}, idle_s=1.0)[-1]
    assert (idle["kind"], idle["s"]) == ("idle", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "recipes"], "--baseline recipes: write padded, unpadded or all"),
        (["--lengths", "350"], "a median from 2 to data.max_length=64"),
        (["--tokens", "63"], "below data.max_length=64"),
        (["--random-weights", "llama3_8b"], "such as llama3_8b+nllb600m"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys, arguments: list[str], message: str):
    assert bench(folder, "--lengths", "20", *arguments) == (1, [])
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1] and not output.out


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "layers.0.fc2.bias"])
def test_a_wrong_weight_gives_one_line_and_no_figure(folder: Path, capsys, monkeypatch, name: str):
    def wrong(*arguments):
        readers = models.frozen_tensors(*arguments)
        if name in readers:
            right = readers[name]()
            readers[name] = lambda: right.roll(1, 0)
        return readers

    monkeypatch.setattr(baselines, "frozen_tensors", wrong)
    assert bench(folder, "--lengths", "20", "--baseline", "padded") == (1, [])
    output = capsys.readouterr()
    assert "step 0: the loss of padded is" in output.err.splitlines()[-1], output.err
    assert not output.out


def test_transformers_modules_get_the_checkpoint_and_nothing_else(folder: Path):
    config = load(folder / "config.toml", ["zero.stage=0"])
    built = models.build_models(config, "", build_world())
    for side, module in (
        ("encoder", M2M100Model.from_pretrained(folder / "encoder").encoder),
        ("decoder", LlamaModel.from_pretrained(folder / "decoder")),
    ):
        ours, theirs = models.frozen_tensors(built, side), dict(module.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name](), theirs[name]) for name in theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_the_unpadded_baseline_agrees_where_its_kernels_are_stood_in_for(
    folder: Path, monkeypatch, causal: bool
):
    """varlen_attn and Liger run on CUDA alone; all else of `unpadded` runs here."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert scale == q.shape[-1] ** -0.5 and max_q == max(cu_q.diff())
        lengths = tuple(cu_q.diff().tolist())
        return attention(q, k, v, cu_seqlens=cu_q, lengths=lengths, causal=window_size == (-1, 0))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    liger = SimpleNamespace(apply_liger_kernel_to_llama=lambda **options: None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    world = build_world()
    config = load(
        folder / "config.toml",
        ["zero.stage=0", "lora.dropout=0.0", f"model.causal={str(causal).lower()}"],
    )
    built = models.build_models(config, "", world)
    engine = build_engine(config, built.stack, world)
    engine.load_trained_state(built.trained, updates=0)
    vocabularies = (built.encoder.vocab_size, built.decoder.vocab_size)
    drawn = documents.Drawn(
        lengths=documents.parse_lengths("20", 64), tokens=512, vocabularies=vocabularies
    )
    (global_batch,) = drawn.global_batches(1, world, config.memory.max_tokens)
    check = step.Check("float32", world, {})
    ours = step.Ours(config=config, world=world, engine=engine, module=built.stack)
    padded, unpadded = (
        baselines.build_baseline(name, config, built, world) for name in ("padded", "unpadded")
    )
    for variant in (ours, padded, unpadded):  # each as if the others were not there
        check(variant.name, 0, variant.run(global_batch))
    assert len(global_batch.micro_batches) > 1
    assert max(check.worst["padded"], check.worst["unpadded"]) < 1e-5


def test_the_fastest_baseline_comes_first(monkeypatch):
    """For its rows are those that a cut-off run must have."""
    made = dataclasses.make_dataclass("Made", ["name", ("by_length", bool, False)])
    monkeypatch.setattr(baselines, "build_baseline", lambda name, *_: made(name))
    gpu = SimpleNamespace(device=torch.device("cuda"))
    built = baselines.build_baselines("all", None, None, gpu)
    assert [each.name for each in built] == ["unpadded", "padded", "padded sorted"]


def test_quantised_linears_beside_full_baselines(folder: Path, capsys):
    need_fp8()
    fp8 = "model.quantization=fp8"
    status, rows = bench(folder, "--baseline", "padded", "--lengths", "20", fp8)
    assert status == 0 and len(rows) == 5
    for row in rows:
        assert row["quantization"] == "fp8" and row["error"] < row["tolerance"] == 0.1
    assert all(row["error"] > 1e-4 for row in rows if row["variant"] == "padded")
    message = "LLM's linears: ours in fp8, the others in full: "
    assert f"{message}losses and gradient norms may be 10% apart" in capsys.readouterr().out


def test_ours_configured_otherwise_runs_beside(folder: Path, capsys):
    others = ["model.quantization=fp8", "model.lora_update=swiglu"]
    words = [word for other in others for word in ("--beside", other)]
    status, rows = bench(folder, "--lengths", "20", *words)
    rows = {row["variant"]: row for row in rows if row["data"] == "excluded"}
    assert status == 0 and list(rows) == ["ours", *(f"ours, {word}" for word in others)]
    assert [row["quantization"] for row in rows.values()] == ["none", "fp8", "none"]
    assert all(1e-4 < row["error"] < row["tolerance"] == 0.1 for row in rows.values())
    assert f"LLM's linears: ours, {others[0]} in fp8, the others" in capsys.readouterr().out
    assert bench(folder, "--lengths", "20", "--beside", "model.quantisation=fp8") == (1, [])
    assert "model.quantisation" in capsys.readouterr().err


def test_baselines_are_compared_as_before_when_ours_is_quantised():
    check = step.Check("float32", build_world(), {"ours": "fp8"})
    one, other, far = ((torch.tensor(value), torch.tensor(1.0)) for value in (1.0, 1.01, 1.2))
    check("ours", 0, one)
    check("padded", 0, other)
    check("padded", 1, one)
    for step_number, result in ((0, far), (1, other)):
        with pytest.raises(ValueError, match="apart, above 1e-0[14]: no figures"):
            check("padded sorted", step_number, result)


def test_drawn_lengths():
    lengths = documents.parse_lengths("350", 512)
    generator = documents.np.random.default_rng(0)
    students, teachers = zip(*(lengths.draw(generator) for _ in range(4000)))
    uncut = [teacher for student, teacher in zip(students, teachers) if max(student, teacher) < 512]
    assert max(max(students), max(teachers)) == 512
    assert 0.35 < sum(teacher < 200 for teacher in uncut) / len(uncut) < 0.45
    ratios = sorted(student / teacher for student, teacher in zip(students, teachers))
    assert 1.09 < ratios[2000] < 1.11 and ratios[400] < 1.0 < 1.2 < ratios[3600]


@pytest.mark.parametrize("parts", ["lines", "sentences"])
def test_texts_in_parts_are_the_same_texts(folder: Path, parts: str):
    """With what stands around and between parts, as long as both sides' limit leaves room."""
    lengths = documents.parse_lengths("100", 128)
    drawn = {
        kind: documents.Drawn(lengths=lengths, tokens=9000, vocabularies=(700, 500), parts=kind)
        for kind in ("whole", parts)
    }
    whole, cut = (
        [document for batch in batches for document in batch]
        for batches in (
            each.global_batches(1, build_world(), 900)[0].micro_batches for each in drawn.values()
        )
    )
    assert 10 < len(cut) <= len(whole) and [one.key for one in cut] == [
        one.key for one in whole[: len(cut)]
    ]
    several = 0
    for one, other in zip(cut, whole):
        starts_Q, ends_Q = one.parts_Q2.T
        gaps = starts_Q[1:] - ends_Q[:-1]
        size = ends_Q[-1]
        assert starts_Q[0] == 0 and size == len(one.student_ids_S) <= 128
        assert set(gaps.tolist()) <= ({1} if parts == "lines" else {0, 1})
        assert one.student_ids_S.max() < 500 and one.teacher_ids_T.max() < 500
        num_text = size - 2 * len(starts_Q) - gaps.sum()
        assert num_text == max(1, len(other.student_ids_S) - 2) or size > 100
        several += len(starts_Q) > 1
    assert several > 3


def test_a_step_of_texts_in_parts_and_no_baseline_of_them(folder: Path, capsys):
    status, rows = bench(folder, "--lengths", "40", "data.parts=sentences")
    assert status == 0 and [row["parts"] for row in rows] == ["sentences"] * 2
    arguments = ["--lengths", "40", "--baseline", "padded", "data.parts=lines"]
    assert bench(folder, *arguments) == (1, [])
    assert "--baseline reads texts whole; leave out data.parts=lines" in capsys.readouterr().err


def test_real_texts_go_in_beside_random_weights(folder: Path):
    random = ("--random-weights", "tiny+tiny")
    status, rows = bench(folder, "--lengths", "20", *random)
    assert status == 0 and [row["data"] for row in rows] == ["excluded", "included"]
    assert all(row["weights"] == "tiny+tiny" for row in rows)


def test_linear(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(step, "SIZES", (128, 256))
    status, rows = bench(folder, "--lengths", "20,equal", "--linear")
    assert [(row["lengths"], row["pack_tokens"]) for row in rows] == [
        (text, size) for text in ("20", "equal") for size in (128, 256)
    ]
    verdicts = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("cost per token")
    ]
    assert len(verdicts) == 2 and status == any(line.endswith(": not linear") for line in verdicts)
    assert (folder / "out" / "rows.png").stat().st_size > 10_000


def test_two_ranks_by_slurm(folder: Path, tmp_path: Path):
    install(tmp_path)
    options = ["--lengths", "20", "--steps", "1", "--baseline", "padded"]
    options += ["--beside", "zero.stage=0"]
    results = {"RANKS": "2", "RESULTS": str(tmp_path / "results")}
    done = submit(tmp_path, "benchmark.sbatch", str(folder / "config.toml"), *options, **results)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [
        json.loads(line) for line in (tmp_path / "results" / "2.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 6
    for row in rows:
        assert row["world_size"] == 2 and row["error"] < 1e-5
        assert row["zero_stage"] == (0 if row["variant"] == "ours, zero.stage=0" else 3)
        assert len(row["rank_step_s"]) == 2
        assert row["rank_step_s"][0].keys() == {"min", "median", "max"}
        assert row["all_gather_gbytes_per_s"] > 0
        # At this size DeepSpeed's defaults keep all of a baseline's weights everywhere.
        if row["data"] == "excluded":
            assert (row["gathered_bytes"] > 0) == (row["variant"] == "ours")
    assert "ours, lengths 20" in done.stdout and "efficiency" in done.stdout


def test_scaling_is_weak_or_strong(tmp_path: Path, capsys):
    shared = {"variant": "ours", "lengths": "350", "data": "excluded"}
    rows = [  # ranks, pairs of a step, pairs/s
        (1, 1000, 100.0),
        (4, 4000, 360.0),
        (8, 1000, 400.0),
    ]
    for ranks, pairs, speed in rows:
        row = shared | {"world_size": ranks, "pair_tokens": pairs, "pairs_per_s": {"median": speed}}
        row["rank_step_s"] = [{"min": 1.0, "median": 2.0, "max": 3.0}] * ranks
        (tmp_path / f"{ranks}.jsonl").write_text(json.dumps(row) + "\n")
    files = [str(tmp_path / f"{ranks}.jsonl") for ranks, _, _ in rows]
    assert step.main(["--scaling", *files]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [(line[0], line[1]) for line in lines] == [("1", "-"), ("4", "weak"), ("8", "strong")]
    shares = [next(cell for cell in line if "%" in cell) for line in lines]
    assert shares == ["100.0%", "90.0%", "50.0%"]
    (tmp_path / "1.jsonl").write_text("no JSON")
    assert step.main(["--scaling", str(tmp_path / "1.jsonl")]) == 1
    assert "not JSON" in capsys.readouterr().err
