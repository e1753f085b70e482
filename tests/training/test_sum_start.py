"""Checkpoints that are added up: as a folder of their own, and as what stage 2 starts from, against
PEFT and plain PyTorch.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mtllm_engine import cli, files
from mtllm_engine.config import FOLLOWING, Config
from mtllm_engine.data.batch import Document
from mtllm_engine.data.stream import agree
from mtllm_engine.finetune import finetune
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.weights import Weights, saved_name
from mtllm_engine.train import open_stream, prepare, train
from mtllm_engine.training import checkpoint, origins
from mtllm_engine.training.origins import add_up
from mtllm_engine.training.step import learning_rate
from tests.support.adapters import write_adapters
from tests.support.padded import Padded, assert_close, attention_mask, load_llm
from tests.support.recipes import error_of
from tests.support.stages import (
    ALONE,
    build_models,
    finetuning_config,
    losses,
    stage1_config,
    stage2_config,
    write_topics,
)
from tests.support.stages import checkpoint as checkpoint_of
from tests.support.zero_worker import run

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTERS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROJECTION, HEAD = "projection.safetensors", "head.safetensors"
OPTIM = {"steps": 3, "lr": 0.02, "warmup_ratio": 0.0, "weight_decay": 0.2, "eps": 1e-3}
"""AdamW's eps is large: else the sign of a gradient near 0, which is rounding's, moves much."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stage 1 of rank 4, an LLM fine-tuned in rank 16, both of scale 2, and an adapter of others:
    of another scale, on some linears.
    """
    folder = build_models(tmp_path_factory.mktemp("sum"))
    write_topics(folder, "eng_Latn", train=16, dev=7)
    train(stage1_config(folder), ALONE)
    lora = {"rank": 16, "alpha": 32.0, "dropout": 0.0}
    finetune(finetuning_config(folder, "sib200", lora=lora), ALONE)
    keys = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
    write_adapters(folder / "other", load_llm(stage1_config(folder)), **keys)
    return folder


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Path:
    return checkpoint_of(folder, "stage1", "latest").resolve()


@pytest.fixture(scope="module")
def task(folder: Path) -> Path:
    """The fine-tuned LLM's checkpoint."""
    return checkpoint_of(folder, "finetune-sib200").resolve()


def standing_on(folder: Path, *parts: Path, learned: str = "all", **sections) -> Config:
    """Stage 2 from a sum, or from one folder, towards the fine-tuned LLM."""
    model = {"init_from": list(map(str, parts))} | sections.pop("model", {})
    only = read_lora(parts[0])
    adapters = FOLLOWING if parts[1:] else {key: getattr(only, key) for key in FOLLOWING}
    lora = {**adapters, "dropout": 0.0, "train": learned}
    return stage2_config(folder, "sib200", model=model, lora=lora, **{"optim": OPTIM} | sections)


def student_of(config: Config, *, learns: bool) -> dict[str, torch.Tensor]:
    """Adapters and projection as a stack reads them."""
    config = replace(config, model=replace(config.model, teacher=""))
    _, weights = build_stack(config, learns=learns)
    names = [
        name for name in weights.shapes if ".student." in name or name.startswith("projection")
    ]
    return {name: read_whole(weights, name) for name in names}


def read_whole(weights: Weights, name: str) -> torch.Tensor:
    shape = weights.shapes[name]
    return weights.read(name, 0, shape.numel()).view(shape)


def copied(path: Path, to: Path, edit: Callable[[dict], None] | None = None) -> Path:
    """A copy of a checkpoint. Args: edit: what is changed in its record."""
    shutil.copytree(path, to)
    if edit:
        record = json.loads((to / "state.json").read_text())
        del record["sha256"]
        edit(record)
        (to / "state.json").write_bytes(files.sealed(record))
    return to


@torch.no_grad()
def states_of(config: Config, *folders: Path) -> torch.Tensor:
    """(T, D), fp64, of PEFT's model with the adapters of all folders active."""
    model = opened(config, *folders).double().eval()
    ids_BL = torch.arange(2, 40)[None]
    mask = attention_mask(torch.ones_like(ids_BL).bool(), causal=False)
    return model(input_ids=ids_BL, attention_mask=mask, use_cache=False)[0][0]


def opened(config: Config, *folders: Path) -> peft.PeftModel:
    names = [f"part{number}" for number in range(len(folders))]
    first, *others = zip(names, folders)
    options = {"adapter_name": first[0], "is_trainable": True}
    model = peft.PeftModel.from_pretrained(load_llm(config), first[1], **options)
    for name, folder in others:
        model.load_adapter(folder, name, is_trainable=True)
    model.base_model.set_adapter(names)
    return model


def test_the_folder_of_a_sum_is_what_init_from_means(
    folder: Path, stage1: Path, task: Path, tmp_path: Path
):
    """An ordinary adapter, with stage 1's projection and the task's head; bitwise what the parts
    give."""
    lora = add_up([str(stage1), str(task)], tmp_path / "sum")
    assert lora == replace(read_lora(tmp_path / "sum"), dropout=lora.dropout)
    assert (lora.rank, lora.scale) == (20, 2.0)
    for name, part in ((PROJECTION, stage1), (HEAD, task)):
        ours, theirs = load_file(tmp_path / "sum" / name), load_file(part / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    parts = standing_on(folder, stage1, task)
    of_folder = standing_on(folder, tmp_path / "sum")
    for learns in (True, False):
        expected, ours = (student_of(config, learns=learns) for config in (parts, of_folder))
        assert expected.keys() == ours.keys()
        assert all(torch.equal(expected[name], ours[name]) for name in ours)
    theirs_TD = states_of(parts, stage1, task)
    assert not torch.equal(theirs_TD, states_of(parts, stage1))
    error = (states_of(parts, tmp_path / "sum") - theirs_TD).abs().max()
    assert error <= 1e-6 * theirs_TD.abs().max()


def test_a_sum_may_be_of_any_adapters_and_of_sums(
    folder: Path, stage1: Path, task: Path, tmp_path: Path
):
    """Of PEFT's folders, other scales, some linears; in any order; of three at once or one by
    one.
    """
    orders = [(stage1, folder / "other", task), (folder / "other", task, stage1)]
    for number, parts in enumerate(orders):
        at_once, first, then = (tmp_path / f"{name}{number}" for name in ("once", "first", "then"))
        add_up(list(map(str, parts)), at_once)
        add_up(list(map(str, parts[:2])), first)
        add_up([str(first), str(parts[2])], then)
        config = standing_on(folder, *parts)
        theirs_TD = states_of(config, *parts)
        for made in (at_once, then):
            error = (states_of(config, made) - theirs_TD).abs().max()
            assert error <= 1e-6 * theirs_TD.abs().max()
            assert read_lora(made).rank == 23
            origins.check_origins(standing_on(folder, made, folder / "other"))


def test_the_command_writes_the_folder(stage1: Path, task: Path, tmp_path: Path, capsys):
    arguments = ["sum", str(stage1), str(task), "--out", str(tmp_path / "sum")]
    assert cli.main(arguments) == 0
    add_up([str(stage1), str(task)], tmp_path / "same")
    names = sorted(path.name for path in (tmp_path / "sum").iterdir())
    assert names == sorted([ADAPTERS, CONFIG, PROJECTION, HEAD, "state.json"])
    for name in names:
        assert (tmp_path / "sum" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert f"{tmp_path / 'sum'}: adapters of rank 20 on q_proj" in capsys.readouterr().out
    assert cli.main(arguments) == 1
    assert f"{tmp_path / 'sum'} is there already" in capsys.readouterr().err


def other(key: str) -> Callable[[dict], None]:
    return lambda record: record["identity"].update({f"model.{key}": "another"})


def test_what_does_not_add_up_is_one_line_and_leaves_nothing(
    stage1: Path, task: Path, tmp_path: Path
):
    def sum_of(*parts: Path) -> str:
        message = error_of(lambda: add_up(list(map(str, parts)), tmp_path / "out" / "sum"))
        assert not list(tmp_path.glob("out/*"))
        return message

    assert "at least two" in sum_of(stage1)
    assert f"{stage1} and {stage1} have a projection each" in sum_of(stage1, stage1)
    assert f"{task} and {task} have a head each" in sum_of(task, task)
    for key in ("causal", "decoder"):
        changed = copied(task, tmp_path / key, other(key))
        message = f"{stage1} and {changed} were trained with another model.{key}"
        assert message in sum_of(stage1, changed)
    # Of one that is damaged and says what it was, and of one that says nothing.
    damaged = copied(task, tmp_path / "damaged")
    tensors = load_file(damaged / ADAPTERS)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, damaged / ADAPTERS)
    assert f"{damaged / ADAPTERS} is damaged" in sum_of(stage1, damaged)
    (damaged / "state.json").unlink()
    assert "NaN or infinite" in sum_of(damaged, stage1)
    assert f"{tmp_path / 'nowhere'} has no {ADAPTERS}" in sum_of(stage1, tmp_path / "nowhere")


@pytest.mark.parametrize("number", [0, 1])
def test_every_part_is_checked_before_it_is_read(
    folder: Path, stage1: Path, task: Path, tmp_path: Path, number: int
):
    parts = [stage1, task]
    sound = parts[number]
    origins.check_origins(standing_on(folder, *parts))
    for key in ("causal", "decoder"):
        parts[number] = copied(sound, tmp_path / key, other(key))
        config = standing_on(folder, *parts)
        message = error_of(partial(origins.check_origins, config))
        assert message.startswith(f"{parts[number]} was trained with another model.{key} than ")
    parts[number] = copied(sound, tmp_path / "damaged")
    path = parts[number] / ADAPTERS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = error_of(partial(train, standing_on(folder, *parts), ALONE))
    assert message.startswith(f"{path} is damaged")


@pytest.mark.parametrize("key", ["causal", "encoder", "decoder"])
def test_a_sum_knows_what_its_parts_were_trained_with(
    folder: Path, stage1: Path, task: Path, tmp_path: Path, key: str
):
    parts = [copied(part, tmp_path / part.parts[-3], other(key)) for part in (stage1, task)]
    add_up(list(map(str, parts)), tmp_path / "sum")
    config = standing_on(folder, tmp_path / "sum", folder / "other")
    message = error_of(lambda: origins.check_origins(config))
    assert message.startswith(f"{tmp_path / 'sum'} was trained with another model.{key} than ")


def steps_of(config: Config) -> list[list[Document]]:
    """The documents of every step of a run."""
    config = prepare(config)
    stack, _ = build_stack(config)
    stream = open_stream(config, build_tokenizer(config, stack), ALONE)
    steps = [agree(stream, ALONE, config.memory.max_tokens) for _ in range(config.optim.steps)]
    stream.close()
    return [sum(step.micro_batches, []) for step in steps]


def learn_plainly(config: Config, student: Padded, teacher: Padded) -> list[float]:
    """Distils as one would write it with PyTorch; the loss of every step."""
    learning = [each for each in student.named.values() if each.requires_grad]
    optim, of_steps = config.optim, []
    decay = {"weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(learning, betas=optim.betas, eps=optim.eps, **decay)
    for step, documents in enumerate(steps_of(config)):
        with torch.no_grad():
            teachers_PD = torch.cat(teacher.pooled(documents, "teacher"))
        students_PD = torch.cat(student.pooled(documents, "student"))
        loss = (students_PD - teachers_PD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, optim.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step)
        optimizer.step()
        of_steps.append(loss.item())
    return of_steps


def opened_student(config: Config) -> Padded:
    """PEFT's with all parts active; of what `lora.train` leaves out nothing learns."""
    parts = list(map(Path, config.model.init_from))
    llm, saved = opened(config, *parts), load_file(parts[0] / PROJECTION)
    for name, parameter in llm.named_parameters():
        is_left_out = config.lora.train == "first" and ".part0." not in name
        parameter.requires_grad_("lora_" in name and not is_left_out)
    projection = nn.Linear(*saved["weight"].T.shape)
    projection.load_state_dict(saved)
    return Padded(config, llm, projection)


def assert_same_trained(saved: Path, student: Padded, ranks: Sequence[int], scales) -> None:
    """A sum's checkpoint and PEFT's parts: zeros where a part has no adapter."""
    matrices = load_file(saved / ADAPTERS)
    named = student.named
    for name, matrix in matrices.items():
        across = 1 if "lora_B" in name else 0
        for number, block in enumerate(matrix.split(ranks, across)):
            theirs = named.get(name.replace(".weight", f".part{number}.weight"))
            expected = torch.zeros_like(block) if theirs is None else theirs.detach()
            expected = expected * (scales[number] / scales[0]) if across else expected
            assert_close(block, expected, name, matrix.abs().max().item())
    for name, ours in load_file(saved / PROJECTION).items():
        assert_close(ours, named[f"projection.{name}"].detach(), name)


@pytest.mark.parametrize("learned", ["all", "first"])
def test_stage_2_from_a_sum_is_that_of_plain_pytorch(
    folder: Path, stage1: Path, task: Path, tmp_path: Path, learned: str
):
    """With both of PEFT's adapters active: AdamW treats a B and its multiple alike only where the
    scales are, or it does not learn.
    """
    second, rank, scale = (task, 16, 2.0) if learned == "all" else (folder / "other", 3, 5 / 3**0.5)
    options = {"learned": learned, "run": {"dir": str(tmp_path / "run")}}
    config = standing_on(folder, stage1, second, **options)
    student, teacher = opened_student(config), Padded(config, opened(config, task))
    plain = learn_plainly(config, student, teacher)
    train(config, ALONE)
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)
    saved = checkpoint_of(tmp_path, "run", "latest")
    assert read_lora(saved).rank == 4 + rank and read_lora(saved).scale == pytest.approx(2.0)
    assert_same_trained(saved, student, [4, rank], [2.0, scale])
    assert (saved / HEAD).read_bytes() == (task / HEAD).read_bytes()


@pytest.fixture(scope="module", params=["all", "first"])
def whole(request, folder: Path, stage1: Path, tmp_path_factory) -> Config:
    """A run of three steps from a sum whose second part has other linears, with dropout."""
    return continued(folder, stage1, tmp_path_factory.mktemp("whole"), request.param)


def continued(folder: Path, stage1: Path, to: Path, learned: str, stop_at: int = 0) -> Config:
    options = {"learned": learned, "run": {"dir": str(to)}}
    config = standing_on(folder, stage1, folder / "other", **options)
    config = replace(config, lora=replace(config.lora, dropout=0.1))
    run(config, ALONE, stop_at=stop_at)
    return config


def test_a_run_from_a_sum_goes_on_as_if_it_had_not_stopped(
    folder: Path, stage1: Path, whole: Config, tmp_path: Path
):
    """Bitwise, moments included; from parts that are still those, all of them."""
    learned = whole.lora.train
    continued(folder, stage1, tmp_path / "run", learned, stop_at=2)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    changed = shutil.copytree(folder / "other", tmp_path / "other")
    tensors = load_file(changed / ADAPTERS)
    tensors[min(tensors)][0, 0] += 1e-3
    save_file(tensors, changed / ADAPTERS)
    here = {"run": {"dir": str(tmp_path / "run")}}
    of_changed = standing_on(folder, stage1, changed, learned=learned, **here)
    of_changed = replace(of_changed, lora=whole.lora)
    assert "model.init_from was" in error_of(lambda: train(of_changed, ALONE))
    other_half = replace(whole.lora, train="all" if learned == "first" else "first")
    message = error_of(lambda: train(replace(whole, run=of_changed.run, lora=other_half), ALONE))
    assert f'lora.train was "{learned}"' in message
    continued(folder, stage1, tmp_path / "run", learned)
    paths = [Path(each) / "checkpoints" / "latest" for each in (whole.run.dir, tmp_path / "run")]
    for name in (ADAPTERS, PROJECTION, "optimizer.safetensors"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    assert losses(Path(whole.run.dir)) == losses(tmp_path / "run")


def test_what_does_not_learn_stays_as_it_was(folder: Path, whole: Config):
    """Bit for bit, weight decay or not; all that learns moves, what one part lacked too."""
    saved = load_file(Path(whole.run.dir) / "checkpoints" / "latest" / ADAPTERS)
    start = student_of(whole, learns=True)
    moments = load_file(Path(whole.run.dir) / "checkpoints" / "latest" / "optimizer.safetensors")
    for name, before in start.items():
        if not name.startswith("decoder"):
            continue
        halves = saved[saved_name(name)].split([4, 3], 1 if name.endswith("_B") else 0)
        if ".frozen_" in name:
            assert torch.equal(before, halves[1])
        elif whole.lora.train == "first":
            assert not (before == halves[0]).any()
        else:
            assert not (before == torch.cat(halves, 1 if name.endswith("_B") else 0)).any()
        assert (f"{name}/exp_avg" in moments) == (".frozen_" not in name)


def test_a_run_from_a_sum_is_a_start_as_any_other(folder: Path, whole: Config):
    """Its checkpoint holds all of the sum, what did not learn too."""
    saved = Path(whole.run.dir) / "checkpoints" / "latest"
    start = student_of(standing_on(folder, saved), learns=True)
    expected = load_file(saved / ADAPTERS)
    adapters = {saved_name(name): value for name, value in start.items() if ".student." in name}
    assert adapters.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in adapters.items())
