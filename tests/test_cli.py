import os
import runpy
import signal
import sys

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from mtllm_engine import cli, train
from mtllm_engine.config import dumps
from mtllm_engine.data.shards import Manifest
from mtllm_engine.languages import FLORES_200, NAMES
from tests.support.stages import build_models
from tests.support.tiny import build_config, build_encoder


class Launched(Exception):
    """The command line that would have replaced this process."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the config reads: nothing is launched where that is not there."""
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def folder(tmp_path, models, monkeypatch):
    """The current folder, with a config `run.toml` and a text `a.txt`; launches are caught."""

    def execv(_, command):
        # Ctrl-C is for the ranks, which save first.
        assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
        raise Launched(*command)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which a launch may set, is as it was afterwards
    monkeypatch.delenv("RANK", raising=False)
    config = build_config(models, run={"dir": str(tmp_path / "run")})
    (tmp_path / "run.toml").write_text(dumps(config))
    (tmp_path / "a.txt").write_text("a text\n")
    return tmp_path


def status_of(main, arguments):
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("", 2, "the following arguments are required: COMMAND; see mtllm --help"),
        ("trian", 2, "argument COMMAND: invalid choice: 'trian' (choose from"),
        ("train", 2, "the following arguments are required: CONFIG"),
        ("train absent.toml", 1, "cannot read the config absent.toml: No such file or directory"),
        ("train . optim.lr=1", 1, "cannot read the config .: Is a directory"),
        ("train a.txt", 1, "a.txt is not valid TOML: "),
        ("train run.toml optim.lrr=1", 1, "unknown key: optim.lrr; did you mean optim.lr?"),
        ("train run.toml optim.lr", 1, "not an override: 'optim.lr'; write section.key=value"),
        ("train run.toml optim.lr=fast", 1, "optim.lr must be a number, not 'fast'"),
        ("train run.toml --gpus 2 optim.lr=0", 1, "optim.lr must be above 0"),
        ("finetune run.toml", 1, "fine-tuning needs task.name and task.train"),
        (
            "train run.toml data.teacher_states=../x",
            1,
            "data.teacher_states: '../x' is no name; use letters, digits and _ . + -",
        ),
        ("train run.toml --gpus 0", 1, "--gpus must be at least 1, not 0"),
        ("train run.toml --gpus two", 2, "argument --gpus: invalid int value: 'two'"),
        ("train run.toml --gpus", 2, "argument --gpus: expected one argument"),
        ("train run.toml --lr=3", 2, "unrecognized arguments: --lr=3; see mtllm train --help"),
        ("validate", 2, "the following arguments are required: CONFIG; see mtllm validate --help"),
        ("shards", 2, "the following arguments are required: ACTION; see mtllm shards --help"),
        ("shards pack a.txt --out out", 2, "the following arguments are required: --language"),
        (
            "shards pack a.txt --out out --language english",
            1,
            "unknown language 'english'; did you mean ",
        ),
        (
            "shards pack a.txt --out out --language sat_Beng",
            1,
            "unknown language 'sat_Beng'; did you mean sat_Olck",
        ),
        (
            "shards pack a.txt --out out --language eng_Latn --shards x",
            2,
            "argument --shards: invalid int value: 'x'",
        ),
        ("shards pack a.txt --out a.txt --language eng_Latn --shards 1", 1, "a.txt "),
        (
            "shards import . --language eng-Latn",
            1,
            "unknown language 'eng-Latn'; did you mean eng_Latn",
        ),
        ("shards import . --language eng_Latn", 1, "no .tar files in ."),
        ("shards verify .", 1, "no manifest.json in .; make one with"),
        ("shards show absent", 1, "no manifest.json in absent; make one with"),
        ("shards show a.txt", 1, "no manifest.json in a.txt; make one with"),
        (
            "shards show . optim.lr=1",
            2,
            "unrecognized arguments: optim.lr=1; see mtllm shards show",
        ),
        (
            "models import folder --out out --layers 2",
            1,
            "--layers is for a file FILE.gguf, not folder; leave out --layers",
        ),
        (
            "models import folder --out out --dtype float32",
            1,
            "--dtype is for a file FILE.gguf, not folder; leave out --dtype",
        ),
    ],
)
def test_mistake_is_one_line(command, status, message, capfd, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert status_of(cli.main, command.split()) == status
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"mtllm: error: {message}") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "command", ["--help", "train --help", "shards --help", "shards pack --help"]
)
def test_help_is_no_mistake(command, capfd):
    assert status_of(cli.main, command.split()) == 0
    out, err = capfd.readouterr()
    assert out.startswith("usage: mtllm") and err == "" and "('" not in out


@pytest.mark.parametrize(
    "command",
    [
        "train run.toml optim.lr=1 run.seed=2 --gpus 3",
        "train run.toml --gpus 3 optim.lr=1 run.seed=2",
        "train --gpus 3 run.toml optim.lr=1 run.seed=2",
        "train run.toml optim.lr=1 --gpus 3 run.seed=2",
        "train run.toml optim.lr=1 --gpus=3 run.seed=2",
    ],
)
def test_train_is_the_deepspeed_launch(command):
    """`deepspeed --num_gpus N --module mtllm_engine.train CONFIG ...`, wherever the overrides
    stand.
    """
    with pytest.raises(Launched) as launched:
        cli.main(command.split())
    python, *options = launched.value.args
    assert python == sys.executable and options[:2] == ["-m", "deepspeed.launcher.runner"]
    assert options[options.index("--num_gpus") + 1] == "3"
    expected = ["--module", "mtllm_engine.train", "run.toml", "optim.lr=1", "run.seed=2"]
    assert options[-len(expected) :] == expected


@pytest.mark.parametrize("name", ["train", "finetune", "targets", "evaluate"])
def test_each_command_launches_its_module(name, monkeypatch):
    """With what was typed, once all that it reads was found to be there."""
    monkeypatch.setattr(cli, "_is_sound", lambda command, words, gpus: command == name)
    task = ["task.name=nli", "task.train=mnli:data", "data.train=[]"]
    with pytest.raises(Launched) as launched:
        cli.main([name, "run.toml", *task])
    assert launched.value.args[-6:] == ("--module", f"mtllm_engine.{name}", "run.toml", *task)


@pytest.mark.parametrize(
    ("name", "more"),
    [("train", []), ("finetune", ["objective.reader=stack", "objective.kind=finetune"])],
)
def test_a_dry_run_is_a_launch_of_its_own(name, more, monkeypatch):
    monkeypatch.setattr(cli, "_is_sound", lambda *_: True)
    task = ["task.name=nli", "task.train=mnli:data", "data.train=[]"]
    with pytest.raises(Launched) as launched:
        cli.main([name, "run.toml", *task, "--dry-run", "--gpus", "2"])
    words = ("--module", "mtllm_engine.dry_run", "run.toml", *task, *more)
    assert launched.value.args[-len(words) :] == words


def test_one_rank_unless_told_otherwise():
    with pytest.raises(Launched) as launched:
        cli.main(["train", "run.toml"])
    assert launched.value.args[launched.value.args.index("--num_gpus") + 1] == "1"


def test_launches_at_the_same_time_have_ports_of_their_own():
    ports = set()
    for _ in range(3):
        with pytest.raises(Launched) as launched:
            cli.main(["train", "run.toml"])
        ports.add(launched.value.args[launched.value.args.index("--master_port") + 1])
    assert len(ports) > 1


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["--local_rank=0"], 2), (["-h"], 0), (["--help"], 0)]
)
def test_a_rank_without_a_config_says_how_it_is_run(arguments, status, capfd):
    assert train.main(arguments) == status
    lines = "".join(capfd.readouterr()).splitlines()
    assert lines == [
        "usage: deepspeed --num_gpus N --module mtllm_engine.train CONFIG [section.key=value ...]"
    ]


MISTAKES = [
    (["absent.toml"], "cannot read the config absent.toml: No such file or directory"),
    (["run.toml", "optim.lrr=1"], "unknown key: optim.lrr; did you mean optim.lr?"),
    (
        ["run.toml", "--gpus"],
        "not an override: '--gpus'; write section.key=value, such as optim.lr=1e-4",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_of_a_machines_ranks_the_first_tells_a_mistake(
    arguments, message, rank, capfd, monkeypatch
):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert train.main(["--local_rank=0", *arguments]) == 1
    assert capfd.readouterr() == ("", "" if rank == "1" else f"mtllm: error: {message}\n")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # that the module has been imported before
@pytest.mark.parametrize("name", ["cli", "train", "finetune", "targets", "evaluate"])
def test_modules_run_as_programs(name, monkeypatch, capfd):
    module = f"mtllm_engine.{name}"
    monkeypatch.setattr(sys, "argv", [module])
    assert status_of(lambda name: runpy.run_module(name, run_name="__main__"), module) == 2
    assert "".join(capfd.readouterr()).count("\n") == 1


def test_languages_are_listed(capsys):
    assert cli.main(["languages"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {*NAMES} and len(lines) == len(NAMES)
    (nko,) = (line for line in lines if line.startswith("nqo_Nkoo"))
    assert nko.split() == ["nqo_Nkoo", "N'Ko", "NKo", "not", "in", "FLORES-200"]
    assert sum(line.endswith("not in FLORES-200") for line in lines) == len(lines) - 204
    assert next(line.split("  ") for line in lines if line.startswith("ory_Orya"))[:2] == [
        "ory_Orya",
        "Odia",
    ]
    assert next(line for line in lines if line.startswith("taq_Tfng")).split() == [
        "taq_Tfng",
        "Tamasheq",
        "Tifinagh",
    ]


def test_languages_of_an_encoder(folder, capsys):
    build_encoder(folder / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    tokenizer.add_tokens(["qaa_Latn"], special_tokens=True)
    tokenizer.save_pretrained(folder / "encoder")
    capsys.readouterr()
    assert cli.main(["languages", "--encoder", str(folder / "encoder")]) == 0
    has = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    lacking = {code for code in FLORES_200 if has[code] == "no"}
    assert lacking == {"arb_Latn", "min_Arab"} and has["nqo_Nkoo"] == "no"
    assert {*has} == {*NAMES, "qaa_Latn"} and has["qaa_Latn"] == has["sat_Olck"] == "yes"


def test_an_encoder_that_nobody_has_is_one_line(capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["languages", "--encoder", "nobody/has-this"]) == 1
    out, err = capfd.readouterr()
    told = "mtllm: error: there is no folder nobody/has-this, and no such model in the hub's cache"
    assert out == "" and err.startswith(told) and err.count("\n") == 1


def test_texts_of_a_language_of_few_encoders_are_packed_and_it_is_told(folder, capfd):
    pack = "shards pack a.txt --shards 1 --out"
    assert cli.main([*f"{pack} english --language".split(), "eng_Latn"]) == 0
    out, err = capfd.readouterr()
    assert "FLORES-200" not in err and " in 1 shard, " in out
    assert cli.main([*f"{pack} out --language".split(), "nij_Latn"]) == 0
    assert "nij_Latn is none of FLORES-200's languages: only an enc" in capfd.readouterr().err
    assert Manifest.load("out").language == "nij_Latn"
