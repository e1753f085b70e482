"""`mtllm validate`: every fault, none that follows from another, before anything is loaded."""

import json
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from mtllm_engine import cli, recipe
from mtllm_engine.config import _toml_value, dumps, examine, from_dict
from mtllm_engine.inspection import ask
from mtllm_engine.validate import validate
from tests.support.families import write_headers
from tests.support.machine import ROOT
from tests.support.recipes import recipe_of
from tests.support.stages import (
    ALONE,
    build_models,
    finetuning_config,
    stage1_config,
    write_topics,
)
from tests.support.tiny import build_corpus, pack_lines

GIANT = {"hidden_size": 16384, "intermediate_size": 49152, "num_hidden_layers": 60}
BIG_GB = 250  # its weights have more, which no machine of the tests holds
LOADED_GB = 3.0  # a process has less that has loaded libraries, and no weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, corpora and a task; a corpus with a cut shard, one in another language, and an LLM
    whose weights are said to be there and take no place."""
    folder = build_models(tmp_path_factory.mktemp("models"))
    build_corpus(folder / "cut", 24)
    shard = next((folder / "cut").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    pack_lines(folder / "arabic", ["a b"] * 8, num_shards=1)
    manifest = json.loads((folder / "arabic" / "manifest.json").read_text())
    del manifest["fingerprint"]
    manifest = json.dumps(manifest | {"language": "arb_Latn"})
    (folder / "arabic" / "manifest.json").write_text(manifest)
    write_topics(folder, "eng_Latn", train=12, dev=4, test=4)
    giant = folder / "giant"
    giant.mkdir()
    for path in (folder / "decoder").glob("token*"):
        (giant / path.name).write_bytes(path.read_bytes())
    tiny = LlamaConfig.from_pretrained(folder / "decoder").to_dict() | GIANT
    config = LlamaConfig(**tiny | {"num_attention_heads": 128, "head_dim": 128})
    config.save_pretrained(giant)
    assert 2 * write_headers(giant, config) > BIG_GB * 1e9
    (folder / "file").touch()
    return folder


CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "ill-typed, unknown and out of range": (
        {},
        ["optim.lrr=1e-3", "data.lanes=many", "lora.rank=0"],
        [
            "data.lanes must be a whole number, not 'many'",
            "unknown key: optim.lrr; did you mean optim.lr?",
            "lora.rank must be at least 1, or 0 where several checkpoints are added up",
        ],
    ),
    "an old key, no section, and a key that is required": (
        {},
        ["model.base=nf4", "lora=3", "run={ }"],
        [
            "missing key: run.dir",
            'unknown key: model.base; it is model.quantization, where "full" is "none" now',
            "lora must be a section, not 3",
        ],
    ),
    "no override, a misspelled section and a share": (
        {},
        ["optim", "validatoin.every=3", "data.pairs=2"],
        [
            "not an override: 'optim'; write section.key=value, such as optim.lr=1e-4",
            "unknown key: validatoin; did you mean validation?",
            "data.pairs is a share: 0 <= pairs <= 1",
        ],
    ),
    "what is not there": (
        {},
        ["model.encoder={}/absent", "model.decoder={}/encoder", "data.train={}/absent"],
        [
            "data.train: no manifest.json in {}/absent; make one with `mtllm shards pack` (from "
            "text) or `mtllm shards import` (from tars)",
            "model.encoder: {}/absent is neither a folder nor a model's name on the hub, which is "
            "OWNER/NAME: mind the folder's spelling",
            "model.decoder: {}/encoder is a m2m_100 model; this takes llama, mistral, ministral, "
            "ministral3, qwen2, qwen3, smollm3, granite, olmo2, phi3, gemma, gemma2, gemma3_text",
        ],
    ),
    "corpora": (
        {},
        ["data.train=['{}/cut', '{}/train']", "validation.corpus={}/file", "data.lanes=25"],
        [
            "data.train: {}/cut/{shard} has {cut} bytes, and {whole} in the manifest; restore it, "
            "run `mtllm shards import` again, or set data.on_error=skip",
            "{}/train has 24 documents, fewer than data.lanes=25",
            "validation.corpus: no manifest.json in {}/file; make one with `mtllm shards pack` "
            "(from text) or `mtllm shards import` (from tars)",
        ],
    ),
    "models that do not fit what is asked": (
        {},
        [
            "data.max_length=300",
            "memory.max_tokens=1000",
            "lora.target_modules=qkv_proj",
            "validation.corpus={}/arabic",
        ],
        [
            "data.max_length=300 is above the 256 of model.encoder",
            "lora.target_modules: 'qkv_proj' is no linear of the LLM; {}/decoder (llama) has "
            "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
            "validation.corpus: {}/arabic: the encoder's tokenizer has no token for the language "
            "arb_Latn; the nearest that it has: arb_Arab, ars_Arab, ary_Arab",
        ],
    ),
    "where a run starts and lies": (
        {},
        ["model.init_from={}/train", "model.teacher={}/absent", "run.dir={}/file/run"],
        [
            "run.dir: {}/file is a file; choose another folder",
            "model.init_from: {}/train is no checkpoint of a run: it has none of "
            "adapter_model.safetensors, projection.safetensors, head.safetensors",
            "model.teacher: {}/absent is no checkpoint of a run: it has none of "
            "adapter_model.safetensors, projection.safetensors, head.safetensors",
        ],
    ),
    "a task": (
        {"command": "finetune"},
        [
            "data.train=[]",
            "task.name=sib20",
            "task.train=sib200:{}/topics",
            "model.teacher={}/train",
            "probe.folder={}",
        ],
        [
            "model.teacher is for distillation",
            "probe.folder is for distillation",
            "task.name: unknown task 'sib20'; did you mean sib200? There are belebele, nli, nusax, "
            "pawsx, sib200, taxi1500, xquad",
        ],
    ),
    "ranks": (
        {"gpus": 9},
        ["zero.stage=1", "deepspeed.optimizer.type=Adam"],
        [
            "zero.stage must be one of 'auto', 0, 3, not 1",
            "9 ranks need at least as many data.lanes; there are 4",
            'deepspeed.optimizer.type = "Adam": leave it out: use optim.lr, optim.betas, optim.eps '
            "and optim.weight_decay (it is AdamW)",
        ],
    ),
    "room": (
        {},
        ["model.decoder={}/giant", "checkpoint.keep=1000000", "evaluate.num_beams=0"],
        [
            "evaluate.num_beams must be at least 1",
            "memory: the weights and what is trained take ",
            "run.dir: checkpoints need ",
        ],
    ),
}
PROGRAM = """
import json, resource, sys
opened = []
def watch(event, arguments):
    path = str(arguments[0]) if event == "open" else ""
    if path.endswith((".bin", ".tar")):
        opened.append(path)
sys.addaudithook(watch)
import torch
from mtllm_engine.model.tensors import TensorFiles
from mtllm_engine.validate import validate
read = TensorFiles.read
TensorFiles.read = lambda self, name, *slice: opened.append(name) or read(self, name, *slice)
results = []
for options, overrides in json.loads(sys.stdin.read()):
    opened.clear()
    report = validate(sys.argv[1], overrides, **options)
    results.append([report.problems, list(opened)])
print(json.dumps([results, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
"""


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What another process says of each case, and which shards it has opened and which tensors it
    has read: of weights' files only the headers are."""
    path = folder / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    asked = [
        (options, [each.replace("{}", str(folder)) for each in overrides])
        for options, overrides, _ in CASES.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        input=json.dumps(asked),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results, most_gb = json.loads(done.stdout.splitlines()[-1])
    assert most_gb < LOADED_GB, "weights were loaded"
    return dict(zip(CASES, map(tuple, results), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_three_faults_are_three_lines(folder: Path, said, case: str):
    """Neither less nor more, and nothing of weights or shards is read."""
    problems, opened = said[case]
    shard = next((folder / "cut").glob("*.tar"))
    manifest = json.loads((folder / "cut" / "manifest.json").read_text())
    (whole,) = [each["bytes"] for each in manifest["shards"] if each["name"] == shard.name]
    names = {"{shard}": shard.name, "{cut}": str(whole - 512), "{whole}": str(whole)}
    expected = CASES[case][2]
    for key, value in (names | {"{}": str(folder)}).items():
        expected = [line.replace(key, value) for line in expected]
    assert len(problems) == 3, problems
    for line, start in zip(problems, expected):
        assert line == start or (case == "room" and line.startswith(start))
    assert opened == []


def test_ten_cases_of_three():
    assert len(CASES) == 10 and all(len(expected) == 3 for _, _, expected in CASES.values())


SOUND = {
    "run": {"dir": "runs/a"},
    "model": {"encoder": "nllb", "decoder": "llama"},
    "data": {"train": ["fineweb"], "pack_documents": 4},
    "optim": {"steps": 10},
}
FAULTS = {  # independent ones: key -> (value, whether it is only out of range)
    "optim.lr": 0,
    "optim.eps": "small",
    "optim.clip": -1,
    "optim.betas": [0.9],
    "lora.dropout": 1,
    "lora.target_modules": ["lm_head"],
    "data.prefetch": 0,
    "data.lanes": True,
    "data.pairs": "all",
    "model.dtype": "fp16",
    "model.quantization": "fp4",
    "model.causal": "no",
    "validation.every": 0,
    "checkpoint.keep": 1.5,
    "evaluate.stack_name": "../x",
    "evaluate.languages": ["a/b"],
    "probe.split": "",
    "run.seed": -1,
    "run.max_bad_steps": 0,
    "languages.fallback": {"ind": "ind_Latn"},
}


@given(st.sets(st.sampled_from(sorted(FAULTS)), max_size=8), st.integers(0, 3))
def test_any_faults_are_each_one_line(keys: set[str], num_unknown: int):
    tree = {name: dict(table) for name, table in SOUND.items()}
    for key in keys:
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = FAULTS[key]
    tree["zero"] = {f"qqq{number}": 1 for number in range(num_unknown)}
    problems = examine(tree).problems
    assert len(problems) == len(keys) + num_unknown
    for key in keys:
        assert sum(key in line for line in problems) == 1
    if problems:
        with pytest.raises(ValueError) as error:
            from_dict(tree)
        assert str(error.value) == problems[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": {"trian": ["x"], "pack_documents": 4, "mixture": [1, 2]}}, ["unknown key"]),
        ({"model": {"encodr": "a", "decoder": "b"}}, ["unknown key: model.encodr; did you mean"]),
        (
            {"model": {"decoder": "b"}, "data": SOUND["data"] | {"encoder": "a"}},
            ["unknown key: data.encoder; did you mean model.encoder?"],
        ),
        ({"modle": {"encoder": "a"}, "model": {}}, ["unknown key: modle; did you mean model?"]),
        ({"objective": {"kind": "distill"}, "probe": {"folder": "x"}}, ["objective.kind must be"]),
        ({"task": {"train": "a:b", "validation": "a:b"}}, ["task.train needs task.name"]),
        ({"data": SOUND["data"] | {"max_length": 2}}, ["data.max_length must be at least 4"]),
        ({"optim": {"steps": -1, "epochs": 1}}, ["optim.steps and optim.epochs must be 0 or"]),
    ],
)
def test_a_fault_that_follows_from_another_is_not_named(change: dict, expected: list[str]):
    problems = examine(SOUND | change).problems
    assert len(problems) == len(expected), problems
    assert all(line.startswith(start) for line, start in zip(problems, expected))


def test_ready_says_what_the_run_will_say(folder: Path, tmp_path: Path, capsys):
    """But for what only the training process knows."""
    from mtllm_engine.train import train

    config = stage1_config(folder, run={"dir": str(tmp_path / "run")}, optim={"steps": 1})
    path = tmp_path / "run.toml"
    path.write_text(dumps(config))
    assert cli.main(["validate", str(path)]) == 0
    ready, *lines = capsys.readouterr().out.splitlines()
    assert ready == "ready" and not (tmp_path / "run").exists()
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    train(config, ALONE)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] in said]
    rows = [line for line in rows if not line.startswith("step 1")]
    ran = {line.split()[0]: line.split(maxsplit=1)[1] for line in rows}
    assert len(ran) >= 9 and ran.items() <= said.items()
    assert said["command"] == "mtllm train" and "this machine has" in said["memory"]
    assert cli.main(["validate", str(path)]) == 0
    assert "(continued after step 1)" in capsys.readouterr().out


def test_a_run_that_cannot_be_continued_is_told(folder: Path, tmp_path: Path):
    from mtllm_engine.train import train

    config = stage1_config(folder, run={"dir": str(tmp_path / "run")}, optim={"steps": 1})
    path = tmp_path / "run.toml"
    path.write_text(dumps(config))
    train(config, ALONE)
    lines = validate(str(path), ["lora.rank=2", "data.lanes=2"], command="train").problems
    assert len(lines) == 2 and all(line.startswith("cannot continue ") for line in lines)
    assert "data.lanes was 4 and is 2" in lines[0] and "lora.rank was 4 and is 2" in lines[1]
    start = str(tmp_path / "run" / "checkpoints" / "latest")
    other = [f"run.dir={tmp_path}/other", f"model.init_from={start}", "model.causal=true"]
    lines = validate(str(path), [*other, "lora.rank=2"], command="train").problems
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"model.init_from: {start} was trained with another model.causal")
    assert lines[1].startswith("lora.rank is 2, and 4 in model.init_from=")


@pytest.mark.parametrize("command", ["train", "finetune", "targets", "evaluate"])
def test_no_rank_is_started_for_what_is_broken(command, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("it was launched"))
    path = tmp_path / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    assert cli.main([command, str(path), "optim.lrr=1", "lora.rank=0"]) == 1
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0].startswith("mtllm: error: unknown key: optim.lrr")
    assert lines[1].startswith("mtllm: error: lora.rank") or lines[2].startswith(
        "mtllm: error: lora.rank"
    )


def test_a_sound_recipe_is_ready(folder: Path, tmp_path: Path, capsys):
    path = recipe_of(folder, tmp_path)
    assert cli.main(["validate", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if " " in line}
    assert lines[0] == "ready" and rows["command"] == "mtllm run, 2 ranks"
    assert rows["stage1"] == "the stack from the bare LLM; 100 steps"
    assert rows["finetune"] == "the LLM, sib200 in English; 3 epochs"
    assert rows["evaluate"].startswith("stack on sib200:")
    assert not (tmp_path / "out").exists()


def test_a_recipes_fault_is_said_once_and_names_its_step(folder: Path, tmp_path: Path):
    path = recipe_of(folder, tmp_path)
    broken = [
        "recipe.gpus=0",
        "model.decoder=/absent/llama",
        "stage1.optim.lrr=1",
        f"stage1.data.train={folder}/absent",
        "task.name=sib20",
        "finetune.optim.lr=fast",
    ]
    problems = validate(str(path), broken).problems
    starts = [
        "recipe.gpus must be at least 1",
        "stage1: unknown key: optim.lrr; did you mean optim.lr?",
        "stage1: data.train: no manifest.json in",
        "model.decoder: /absent/llama is neither a folder",
        "finetune: optim.lr must be a number, not 'fast'",
        "finetune, stage2, evaluate: task.name: unknown task 'sib20'",
    ]
    assert len(problems) == len(starts), problems
    assert all(any(line.startswith(start) for line in problems) for start in starts), problems


def test_test_sets_are_missed_beside_a_model(folder: Path, tmp_path: Path):
    broken = ["model.encoder=/absent/nllb", f"task.test=sib200:{folder}/train"]
    problems = validate(str(recipe_of(folder, tmp_path)), broken).problems
    assert len(problems) == 2, problems
    lack = f"task.test: sib200:{folder}/train has no test examples in any language"
    assert problems[1] == f"evaluate: {lack}" and problems[0].startswith("model.encoder: /absent")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("recipe.seed=1", "unknown key: recipe.seed; there are dir, gpus, seeds"),
        ("recipe.seeds=3", "recipe.seeds must be of type list, not 3"),
        ("recipe=3", "recipe must be a section, not 3"),
        ("stage2.from=nothing", "stage2.from must be one of sum, stage1, not 'nothing'"),
        ("stage1=3", "stage1 must be a section, not 3"),
        ("model.init_from=3", "model.init_from must be a list, not 3"),
    ],
)
def test_what_is_wrong_in_a_recipe_itself(folder, tmp_path, override, start):
    problems = validate(str(recipe_of(folder, tmp_path)), [override]).problems
    assert len(problems) == 1 and problems[0].startswith(start), problems


def test_a_recipe_that_is_sound_is_the_one_that_runs(folder: Path, tmp_path: Path):
    path = recipe_of(folder, tmp_path)
    draft = recipe.examine(recipe.configs.read(path), path)
    assert not draft.problems and draft.recipe() == recipe.load(path)


def test_what_a_file_is_for(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(dumps(finetuning_config(folder, "sib200")))
    report = validate(str(path), describe=True)
    assert report.problems == [] and report.header["command"] == "mtllm finetune"
    (line,) = validate(str(path), command="train").problems
    assert line == 'objective.kind = "finetune": that is `mtllm finetune`, this distils'


def test_a_table_that_whole_weights_do_not_read_is_a_warning(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    table = "deepspeed.wall_clock_breakdown=true"
    report = validate(str(path), [table, "zero.stage=0"], gpus=2)
    assert report.problems == [] and report.warnings == [
        "weights are whole on each of 2 CPU ranks (zero.stage=0); [deepspeed] has no effect; set "
        "zero.stage=3 to use it"
    ]
    assert validate(str(path), [table, "zero.stage=auto"], gpus=2).warnings == []


def test_more_than_fits_is_a_warning_while_the_weights_do(folder: Path, tmp_path: Path):
    """Micro-batches may be smaller than the largest that are allowed."""
    path = tmp_path / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    wide = ["memory.max_tokens=999_999_999_999", "data.lanes=20", "data.pack_documents=999_999_999"]
    report = validate(str(path), wide)
    assert report.problems == [] and report.warnings[0].startswith("memory: estimated ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 < LOADED_GB + 1


def test_a_task_with_fewer_examples_than_lanes_is_told(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(dumps(finetuning_config(folder, "sib200")))
    assert validate(str(path), ["data.lanes=12"]).problems == []
    said = f"task.train: sib200:{folder}/topics has 12 examples, fewer than data.lanes=13"
    assert validate(str(path), ["data.lanes=13"]).problems == [said]
    recipe_path = str(recipe_of(folder, tmp_path))
    problems = validate(recipe_path, ["data.lanes=13"]).problems
    assert problems == [f"finetune, stage2: {said}"]


def test_what_is_no_model_is_one_line(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    for kind in ("encoder", "decoder"):
        broken = tmp_path / kind
        shutil.copytree(folder / kind, broken)
        (broken / "config.json").write_text("{")
        other = folder / ("decoder" if kind == "encoder" else "encoder")
        for named in (broken, other, tmp_path):
            (line,) = validate(str(path), [f"model.{kind}={named}"]).problems
            assert line.startswith(f"model.{kind}: {named} ")


def test_the_same_fault_with_and_without_its_key_is_one_line():
    problems: list[str] = []

    def fail() -> None:
        raise ValueError("a/config.json cannot be read")

    for names in (("model.adapters", ""), ("", "model.adapters")):
        problems.clear()
        for name in names:
            ask(problems, fail, name)
        assert len(problems) == 1


def test_a_place_that_holds_no_files_is_told(folder: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(dumps(stage1_config(folder)))
    (line,) = validate(str(path), ["run.dir=/proc/x"]).problems
    assert line.startswith("run.dir: ") and line.endswith("choose another folder")
    assert "0.0 GB" not in line


def test_a_recipe_that_lacks_something_is_told_that_alone(folder: Path, tmp_path: Path):
    path = recipe_of(folder, tmp_path)
    tree = tomllib.loads(path.read_text())
    for section, key, expected in (
        ("data", None, "stage1, finetune, stage2: missing key: data"),
        ("task", "test", "evaluate: task.test names no test set; write DATASET:FOLDER"),
    ):
        tables = {name: dict(table) for name, table in tree.items()}
        if key:
            del tables[section][key]
        else:
            tables.pop(section), tables["stage1"].pop(section)
        draft = tmp_path / f"{section}.json"
        draft.write_text(_toml(tables))
        assert validate(str(draft)).problems == [expected]
    broken = ["recipe.gpus=0", "recipe.seeds=['a']", "recipe.dir="]
    assert sorted(validate(str(path), broken).problems) == [
        "recipe.dir is empty",
        "recipe.gpus must be at least 1",
        "recipe.seeds must be a list of whole numbers, of one or more",
    ]


def _toml(tables: dict[str, dict]) -> str:
    lines = []
    for name, table in tables.items():
        lines += [f"{name}.{key} = {_toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines)
