"""A recipe that works in `out` beside it, what a job leaves, and a launcher that starts nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mtllm_engine import config as configs
from mtllm_engine import recipe
from mtllm_engine.config import Config

TEXT = """
[recipe]
dir = "{folder}"
gpus = 2
seeds = [3, 4]
[model]
encoder = "nllb"
decoder = "llama"
[lora]
rank = 8
[data]
lanes = 4
pack_documents = 2
max_length = 128
[task]
name = "nli"
train = "mnli:data/mnli"
validation = "mnli:data/mnli"
test = ["xnli:data/xnli"]
[evaluate]
systems = ["stack"]
[stage1.data]
train = ["fineweb"]
[stage1.optim]
steps = 100
lr = 2e-4
[finetune.optim]
epochs = 3.0
lr = 1e-4
[stage2.optim]
epochs = 5.0
[stage2.validation]
every = 50
"""


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(TEXT.format(folder=folder / "out"))
    return path


def recipe_of(folder: Path, tmp_path: Path, corpus: str = "train") -> Path:
    """The same on real files: models, a corpus and SIB-200's topics in a folder."""
    text = TEXT.format(folder=tmp_path / "out")
    for name, value in (
        ('"nllb"', f'"{folder}/encoder"'),
        ('"llama"', f'"{folder}/decoder"'),
        ('"fineweb"', f'"{folder}/{corpus}"'),
        ('"nli"', '"sib200"'),
        ("mnli:data/mnli", f"sib200:{folder}/topics"),
        ("xnli:data/xnli", f"sib200:{folder}/topics"),
    ):
        text = text.replace(name, value)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def jobs(path: Path, *overrides: str) -> dict[str, Config]:
    """A recipe's configurations, by the names of its jobs."""
    return {job.name: job.config for job in recipe.load(path, overrides).jobs}


def error_of(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the jobs read is looked for: there is none of it."""
    for name in ("checkpoint_tensors", "find_tests", "check_files"):
        monkeypatch.setattr(recipe, name, lambda _: None)


def record_launches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[tuple[str, str]]]:
    """Stands for the launcher; a job fails whose name is in the folder's file `fails`.

    Returns:
        What says which modules were started since its last call, with which configurations.
    """
    log, fails, script = folder / "log", folder / "fails", folder / "launcher"
    fails.touch(), log.touch()
    script.write_text(f'echo "$1 $2" >> {log}; ! grep -qx "$(basename "$2" .toml)" {fails}\n')
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: ["sh", str(script), module])
    without_files(monkeypatch)

    def since() -> list[tuple[str, str]]:
        lines = log.read_text().splitlines()
        log.write_text("")
        return [tuple(line.split(" ")) for line in lines]

    return since


def write_run(folder: Path, config: Config, *, step: int) -> None:
    """What is left of a training run that ended after `step` steps."""
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / "latest").symlink_to(f"step-{step:08d}")
    (folder / "config.toml").write_text(configs.dumps(config))
