"""Every command and every line of Python of the README and the handbooks runs as it stands there.

In one empty folder, in the order in which they stand, with tiny models, corpora and benchmarks
under the names that are written: a folder `intfloat/multilingual-e5-small` is that model here. What
a command starts elsewhere (a launcher, a recipe's jobs) runs in this process, on one rank.
"""

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pyarrow
import pyarrow.parquet
import pytest
import webdataset

from mtllm_engine import babel, cli, recipe
from mtllm_engine.config import load
from tests.babel.test_babel import TINY
from tests.support.encoders import build_padded_encoder
from tests.support.handbooks import HANDBOOKS, Block, blocks, prose
from tests.support.machine import ROOT
from tests.support.stages import write_topics
from tests.support.tiny import build_decoder, build_encoder, texts

PARSED = {  # what is not run, but looked at: is all there that it names?
    r"git clone|cd |source |pip install|python -m venv": "makes an environment, or needs a network",
    r"hf download": "needs a network; the file is there already",
    r"mtllm export runs/real": "of what `make real` trains",
    r"make ": "takes minutes; `make quickstart` is `mtllm babel build` and `mtllm run`",
    r"sbatch|deepspeed|torchrun|mtllm train .* --gpus 8": "for a cluster",
    r"mtllm babel build": "trains for minutes; the small land is there already",
    r"mtllm sweep": "runs a recipe many times: tests/test_sweep.py",
    r"mtllm models import": "needs a file of GGUF: tests/test_models.py",
    r"python -m benchmarks.(babel|parts|truncation)": "an hour: tests/benchmarks",
    r"python -m benchmarks.(step|profile)": "tests/benchmarks/test_step_benchmark.py",
    r"python -m benchmarks.(gpu_suite|kernels|attention)": "tests/benchmarks/test_gpu_suite.py",
    r"python -m benchmarks.convergence": "tests/benchmarks/test_convergence.py",
    r"python -m benchmarks.quality": "tests/benchmarks/test_quality.py",
    r"python -m benchmarks.encode": "needs sentence-transformers: tests/export/test_sentences.py",
    r"python -m pytest": "is tests",
}
FEW = ["zero.stage=0", "run.log_every=1"]
RECIPE = [*FEW, "recipe.gpus=1", "stage1.optim.steps=2", "finetune.optim.epochs=1.0"]
RECIPE += ["stage2.optim.steps=2", 'evaluate.languages=["qaa_Latn"]', "stage1.probe.lines=4"]
SHORTER = {  # what is added to a command to make it short
    r"mtllm train configs/first.toml": [*FEW, "optim.steps=2"],
    r"mtllm run .*recipe.dir=runs/quickstart/nli": [*RECIPE[:-1], "stage1.optim.steps=0"],
    r"mtllm run configs/quickstart.toml$": RECIPE,
    r"mtllm evaluate": FEW,
}


@dataclass(frozen=True)
class Command:
    """A line of a block of commands."""

    where: str
    line: str

    @property
    def parsed_as(self) -> str | None:
        """The pattern of PARSED that it is of; None: it is run."""
        return next((each for each in PARSED if re.match(each, self.line)), None)

    def words(self) -> list[str]:
        """As a shell makes them, in the current folder."""
        expanded = []
        for word in shlex.split(self.line):
            found = sorted(map(str, Path().glob(word))) if "*" in word else []
            expanded += found or [word]
        return expanded


def commands(block: Block) -> Iterator[Command]:
    number = block.line
    for line in block.text.splitlines():
        if line.strip():
            yield Command(f"{block.handbook}:{number}", line)
        number += 1


SHELL = [block for name in HANDBOOKS for block in blocks(name) if block.language == "sh"]
COMMANDS = [command for block in SHELL for command in commands(block)]


def write_world(folder: Path) -> None:
    """What the commands name and no command makes."""
    (folder / "configs").symlink_to(ROOT / "configs")
    build_decoder(folder / "HuggingFaceTB" / "SmolLM2-135M")
    small = folder / "intfloat" / "multilingual-e5-small"
    build_padded_encoder(small, "e5-small", max_position_embeddings=140)
    build_encoder(folder / "facebook" / "nllb-200-distilled-600M")
    babel.build_sized(folder / "runs" / "quickstart" / "land", TINY, seed=0)
    lines = texts(400, seed=3)
    (folder / "text").mkdir()
    table = pyarrow.table({"text": ["", *lines]})
    pyarrow.parquet.write_table(table, folder / "text" / "train-00000-of-00001.parquet")
    documents = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "texts").mkdir()
    for path in (folder / "texts" / "a.jsonl", folder / "texts.jsonl"):
        path.write_text(documents)
    (folder / "texts.txt").write_text("\n".join(lines[:5]))
    (folder / "shards").mkdir()
    with webdataset.ShardWriter(str(folder / "shards" / "%06d.tar"), verbose=0) as writer:
        for number, line in enumerate(lines[:8]):
            writer.write({"__key__": str(number), "txt": line})
    for language in ("eng_Latn", "swh_Latn"):
        write_topics(folder, language, train=4, dev=4, test=4)
    (folder / "sib-200" / "data").mkdir(parents=True)
    shutil.move(folder / "topics", folder / "sib-200" / "data" / "annotated")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; what would start processes of its own stays in this one."""
    write_world(tmp_path)
    program = tmp_path / "bin" / "mtllm"  # as the environment has it, of this checkout
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mtllm_engine.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "_become", become)
    monkeypatch.setattr(recipe, "_launch", lambda command: run_module(command[-2], command[-1:]))
    return tmp_path


def become(module: str, gpus: int, words: Sequence[str]) -> NoReturn:
    """Instead of the launcher's process the module runs in this one, and ends it as that would."""
    sys.exit(run_module(module, words))


def run_module(module: str, words: Sequence[str]) -> int:
    """What `python -m MODULE WORDS` ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        main = getattr(importlib.import_module(module), "main", None)
        if main is None:
            return status_of(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
        return status_of(lambda: main(list(words)))


def status_of(call: Callable[[], object]) -> int:
    try:
        status = call()
    except SystemExit as left:
        status = left.code
    return status if isinstance(status, int) else int(status is not None and not _is_module(status))


def _is_module(value: object) -> bool:
    return isinstance(value, dict)  # what runpy returns


def run(command: Command) -> int:
    """Its exit status."""
    extra = [words for each, words in SHORTER.items() if re.match(each, command.line)]
    words = [*command.words(), *(extra[0] if extra else [])]
    if words[0] == "mtllm":
        return status_of(lambda: cli.main(words[1:]))
    if words[:2] == ["python", "-m"]:
        return run_module(words[2], words[3:])
    return subprocess.run(["bash", "-eo", "pipefail", "-c", command.line]).returncode


def test_every_command_and_every_line_of_python_runs(workplace: Path, capfd):
    failed = []
    for name in HANDBOOKS:
        for block in blocks(name):
            if block.language == "python" and name != "README.md":  # that one: test_readme.py
                code = compile(block.text, block.where, "exec")
                if "runs/real" not in block.text:  # which `make real` trains, for an hour
                    exec(code, {})
            for command in commands(block) if block.language == "sh" else ():
                if command.parsed_as is None and run(command):
                    said = capfd.readouterr().err[-500:]
                    failed.append(f"{command.where}: {command.line}\n{said}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("pattern", PARSED)
def test_what_is_not_run_is_written_somewhere(pattern: str):
    assert any(command.parsed_as == pattern for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.parsed_as], ids=lambda each: each.where
)
def test_what_is_not_run_names_what_is_there(command: Command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command.words()
    if words[0] == "make":
        assert re.search(rf"^\.PHONY:.*\b{words[1]}\b", Path("Makefile").read_text(), re.MULTILINE)
    elif words[0] == "mtllm":
        parsed, rest = cli._build_parser().parse_known_args(words[1:])
        assert not [word for word in rest if word.startswith("-")]
    elif words[0] == "sbatch":
        (script,) = (word for word in words if word.endswith(".sbatch"))
        assert Path(script).is_file()
    elif words[:2] == ["python", "-m"] and words[2] == "pytest":
        assert all(Path(word).is_file() for word in words[3:] if word.endswith(".py"))
    module = next((words[i + 1] for i, word in enumerate(words) if word in ("-m", "--module")), "")
    if module.startswith(("benchmarks", "mtllm_engine")):
        source = sources(module)
        shown = words[words.index(module) + 1 :]
        options = [word for word in shown if word.startswith("--")]
        assert not [option for option in options if f'"{option}"' not in source]
    check_config(words)


def sources(module: str) -> str:
    """Of a module, and of the benchmarks that it imports, which may read the options."""
    text = Path(find_spec(module).origin).read_text()
    others = re.findall(r"^from (benchmarks\.\w+) import", text, re.MULTILINE)
    return "".join([text, *(Path(find_spec(each).origin).read_text() for each in others)])


def check_config(words: Sequence[str]) -> None:
    """The configuration that is named, if one is that is there, is valid with its overrides."""
    paths = [word for word in words if word.startswith("configs/") and word.endswith(".toml")]
    overrides = [word for word in words if re.match(r"[a-z0-9_]+\.[a-z0-9_.]+=", word)]
    for path in paths:
        if "recipe" in Path(path).read_text().split("[", 2)[1]:
            recipe.load(path, [re.sub(r",.*", "", word) for word in overrides])
        else:
            alone = ["zero.stage=0"] if words[0] == "python" else []  # as without a launcher
            load(path, [*overrides, *alone])


@pytest.mark.parametrize("name", HANDBOOKS)
def test_commands_in_sentences_are_commands(name: str):
    """`mtllm evaluate`, or `mtllm export --merge`: with names that there are."""
    parser = cli._build_parser()
    for text in re.findall(r"`mtllm ([a-z][^`]*)`", prose(name)):
        here = parser
        for word in text.split():
            options = {each for action in here._actions for each in action.option_strings}
            choices = next((each.choices for each in here._actions if each.choices), {})
            if word.startswith("--"):
                assert word.partition("=")[0] in options, text
            elif isinstance(choices, dict) and word in choices:
                here = choices[word]
            else:
                assert not isinstance(choices, dict) or not choices, text


def test_a_command_that_fails_is_told(workplace: Path):
    assert run(Command("here:1", "mtllm shards show nowhere")) == 1
    assert run(Command("here:1", "ls nowhere")) != 0
    assert os.listdir(workplace)
