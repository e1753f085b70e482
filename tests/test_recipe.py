"""One file for the whole method: which jobs it makes, of what, and which of them are run when."""

import csv
import itertools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine import config as configs
from mtllm_engine import recipe, results
from mtllm_engine.config import Config
from mtllm_engine.results import Predictions
from stages import build_models, write_passages, write_topics

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
[distil.optim]
epochs = 5.0
[distil.run]
validate_every = 50
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe that works in `out` beside it."""
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT.format(folder=tmp_path / "out"))
    return path


def jobs(path: Path, *overrides: str) -> dict[str, Config]:
    return {job.name: job.config for job in recipe.load(path, overrides).jobs}


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_jobs_in_the_order_of_the_method(path: Path):
    made = recipe.load(path)
    assert made.gpus == 2 and made.folder == path.parent / "out"
    assert [(job.name, job.module) for job in made.jobs] == [
        ("stage1", "mtllm_engine.train"),
        ("finetune-3", "mtllm_engine.finetune"),
        ("distil-3", "mtllm_engine.train"),
        ("evaluate-3", "mtllm_engine.evaluate"),
        ("finetune-4", "mtllm_engine.finetune"),
        ("distil-4", "mtllm_engine.train"),
        ("evaluate-4", "mtllm_engine.evaluate"),
    ]


def test_each_step_reads_what_the_one_before_it_wrote(path: Path):
    """One start for all seeds; of the same seed, the teacher of stage 2 and what is evaluated, the best of each."""
    made, out = jobs(path), str(path.parent / "out")
    assert made["stage1"].model.start == made["stage1"].model.teacher == ""
    for seed in (3, 4):
        finetune, distil, evaluate = (made[f"{step}-{seed}"] for step in ("finetune", "distil", "evaluate"))
        assert (finetune.model.start, finetune.model.teacher) == ("", "")
        assert distil.model.start == f"{out}/stage1/checkpoints/latest"
        assert distil.model.teacher == evaluate.model.teacher == f"{out}/finetune-{seed}/checkpoints/best"
        assert evaluate.model.start == f"{out}/distil-{seed}/checkpoints/best"
        assert evaluate.evaluate.results == f"{out}/results"
        assert {each.run.seed for each in (finetune, distil, evaluate)} == {seed}
    assert all(config.run.dir == f"{out}/{name}" for name, config in made.items())


def test_each_step_has_its_objective_and_its_task(path: Path):
    made = jobs(path)
    kinds = {name: (config.objective.kind, config.objective.reader) for name, config in made.items()}
    assert kinds["stage1"] == kinds["distil-3"] == ("distil", "stack") and kinds["finetune-3"] == ("finetune", "llm")
    files = {name: (config.task.name, config.task.train, config.task.test) for name, config in made.items()}
    assert files["stage1"] == ("", "", ())
    assert files["finetune-3"] == files["distil-3"] == ("nli", "mnli:data/mnli", ())
    assert files["evaluate-3"] == ("nli", "", ("xnli:data/xnli",))
    assert made["stage1"].data.train == ("fineweb",)
    assert all(config.data.train == () for name, config in made.items() if name != "stage1")


def test_a_steps_own_tables_are_laid_over_the_shared_ones(path: Path):
    made = jobs(path, "optim.weight_decay=0.5", "finetune.lora.rank=2", "distil.data.max_length=64")
    optim = {name: (each.optim.steps, each.optim.epochs, each.optim.lr) for name, each in made.items()}
    assert optim["stage1"] == (100, 0.0, 2e-4)
    assert optim["finetune-3"] == optim["finetune-4"] == (0, 3.0, 1e-4)
    assert optim["distil-3"] == (0, 5.0, configs.OptimConfig().lr)
    assert {each.optim.weight_decay for each in made.values()} == {0.5}
    ranks = {name: each.lora.rank for name, each in made.items()}
    assert ranks["finetune-3"] == 2 and ranks["stage1"] == ranks["distil-3"] == 8
    lengths = {name: each.data.max_length for name, each in made.items()}
    assert lengths["distil-3"] == lengths["evaluate-3"] == 64  # the stack is tested as it was distilled
    assert lengths["stage1"] == lengths["finetune-3"] == 128
    assert made["distil-3"].run.validate_every == 50 and made["evaluate-3"].evaluate.systems == ("stack",)


def test_without_stage_1_the_stack_starts_anew(path: Path):
    made = jobs(path, "stage1.optim.steps=0", "recipe.seeds=[7]")
    assert list(made) == ["finetune-7", "distil-7", "evaluate-7"]
    assert made["distil-7"].model.start == ""


def test_a_shared_number_of_steps_leaves_those_alone_that_set_epochs(path: Path):
    """0 is no stage 1, where it has no number of its own."""
    path.write_text(path.read_text().replace("steps = 100\n", ""))
    assert list(jobs(path, "optim.steps=0", "recipe.seeds=[7]")) == ["finetune-7", "distil-7", "evaluate-7"]
    made = jobs(path, "optim.steps=30")
    optim = {name: (config.optim.steps, config.optim.epochs) for name, config in made.items()}
    assert (optim["stage1"], optim["finetune-3"], optim["distil-3"]) == ((30, 0.0), (0, 3.0), (0, 5.0))
    for own in ("stage1.optim.epochs=2.0", "optim.epochs=2.0"):
        stage1 = jobs(path, "optim.steps=0", own)["stage1"].optim
        assert (stage1.steps, stage1.epochs) == (0, 2.0)
    assert "stage1" not in jobs(path, "optim.epochs=2.0", "stage1.optim.steps=0")


@pytest.mark.parametrize(("steps", "starts"), [(100, ["mine", "", "OUT/stage1/checkpoints/latest"]), (0, ["", "mine"])])
def test_the_stacks_first_step_starts_from_a_shared_start(path: Path, steps: int, starts: list[str]):
    """The LLM that learns the task does not: these are a stack's adapters."""
    made = jobs(path, "model.start=mine", f"stage1.optim.steps={steps}", "recipe.seeds=[7]")
    found = [config.model.start.replace(f"{path.parent}/out", "OUT") for config in made.values()]
    assert found == [*starts, "OUT/distil-7/checkpoints/best"]
    assert jobs(path, "model.start=mine", "finetune.model.start=own")["finetune-3"].model.start == "own"


def test_stored_targets_are_a_job_before_stage_2(path: Path):
    """Of stage 2's own configuration, so that what is written is what is read."""
    made = recipe.load(path, ["distil.data.targets=teacher", "recipe.seeds=[7]"]).jobs
    assert [job.name for job in made] == ["stage1", "finetune-7", "targets-7", "distil-7", "evaluate-7"]
    targets, distil = made[2:4]
    assert targets.module == "mtllm_engine.targets" and targets.config == distil.config
    assert re.fullmatch("teacher-7-[0-9a-f]{8}", distil.config.data.targets)


def test_targets_of_another_teacher_have_another_name(path: Path):
    """They lie beside corpora that seeds and settings share; a teacher that two settings share is stored once."""

    def names(*overrides: str) -> list[str]:
        made = jobs(path, "distil.data.targets=t", f"recipe.dir={path.parent / 'more'}", *overrides)
        return [config.data.targets for name, config in made.items() if name.startswith("targets")]

    first = names()
    assert [name[:4] for name in first] == ["t-3-", "t-4-"]
    assert names("distil.optim.lr=1e-3", "recipe.dir=elsewhere") == first
    others = ("finetune.optim.lr=1e-3", "lora.rank=4", "distil.data.max_length=64", "distil.model.causal=true")
    assert len({*first, *(name for other in others for name in names(other))}) == 2 + 2 * len(others)


def test_without_a_validation_set_the_last_checkpoints_are_taken(path: Path):
    """None is the best there."""
    path.write_text("".join(line for line in path.open() if not line.startswith("validation")))
    made = jobs(path)
    assert Path(made["distil-3"].model.teacher).name == Path(made["evaluate-3"].model.start).name == "latest"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.optim.lrr=1", "stage1: unknown key: optim.lrr; did you mean optim.lr?"),
        ("finetune.optim.epochs=-1", "finetune-3: optim.steps and optim.epochs must be 0 or above"),
        ("distil.lora.targets=[1]", "distil-3: lora.targets[0] must be a string"),
        ("evaluate.systems=[]", "evaluate-3: evaluate.systems is empty"),
        ("distil.optim=1", "distil.optim must be a section, not 1"),
        ("distil=1", "distil must be a section, not 1"),
        ("model.encoderr=a", "stage1: unknown key: model.encoderr; did you mean model.encoder?"),
        ("optim=1", "optim must be a section, not 1"),
        ("recipe=1", "recipe must be a section, not 1"),
        ("recipe.seed=1", "unknown key: recipe.seed; there are dir, gpus, seeds"),
        ("recipe.gpus=two", "recipe.gpus must be of type int, not 'two'"),
        ("recipe.gpus=0", "recipe.gpus must be at least 1"),
        ("recipe.seeds=[]", "recipe.seeds a list of whole numbers"),
        ("recipe.seeds=[true]", "recipe.seeds a list of whole numbers"),
        ("recipe.seeds=[1, 1]", "recipe.seeds=[1, 1] has one of them twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_step(path: Path, override: str, message: str):
    assert message in error_of(lambda: recipe.load(path, [override]))


def test_a_recipe_without_a_folder_is_refused(path: Path):
    path.write_text(path.read_text().replace("dir =", "gpus = 1 #").replace("gpus = 2", ""))
    assert error_of(lambda: recipe.load(path)) == f"missing key: recipe.dir in {path}"


def without_files(monkeypatch) -> None:
    """Nothing that the jobs read is looked for: there is none of it."""
    for name in ("run_checkpoint", "find_tests", "check_files"):
        monkeypatch.setattr(recipe, name, lambda _: None)


@pytest.fixture
def launches(tmp_path: Path, monkeypatch) -> Callable[[], list[tuple[str, str]]]:
    """Stands for the launcher: what was started since the last call; a job fails whose name is in the file `fails`."""
    log, fails, script = tmp_path / "log", tmp_path / "fails", tmp_path / "launcher"
    fails.touch(), log.touch()
    script.write_text(f'echo "$1 $2" >> {log}; ! grep -qx "$(basename "$2" .toml)" {fails}\n')
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: ["sh", str(script), module])
    without_files(monkeypatch)

    def since() -> list[tuple[str, str]]:
        lines = log.read_text().splitlines()
        log.write_text("")
        return [tuple(line.split(" ")) for line in lines]

    return since


def test_what_is_done_is_not_run_again(path: Path, launches, capsys):
    made = recipe.load(path)
    assert recipe.run(made) == 0
    assert launches() == [(job.module, f"{made.folder}/{job.name}.toml") for job in made.jobs]
    for job in made.jobs:
        assert configs.load(made.folder / f"{job.name}.toml") == job.config
    assert recipe.run(recipe.load(path)) == 0 and launches() == []
    assert f"all steps are done: {made.results / 'results.md'}" in capsys.readouterr().out
    assert recipe.run(recipe.load(path, ["recipe.seeds=[3, 4, 5]"])) == 0
    assert [Path(started).stem for _, started in launches()] == ["finetune-5", "distil-5", "evaluate-5"]


def test_a_failure_stops_the_recipe_and_the_same_command_goes_on_from_there(path: Path, launches, capsys):
    fails = path.parent / "fails"
    fails.write_text("distil-3\n")
    assert recipe.run(recipe.load(path)) == 1
    assert [Path(started).stem for _, started in launches()] == ["stage1", "finetune-3", "distil-3"]
    assert "mtllm: error: distil-3 failed; run the same command again" in capsys.readouterr().err
    fails.write_text("")
    assert recipe.run(recipe.load(path)) == 0
    started = [Path(started).stem for _, started in launches()]
    assert started == ["distil-3", "evaluate-3", "finetune-4", "distil-4", "evaluate-4"]


def write_run(folder: Path, config: Config, *, step: int) -> None:
    """What is left of a training run that ended after `step` steps."""
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / "latest").symlink_to(f"step-{step:08d}")
    (folder / "config.toml").write_text(configs.dumps(config))


def test_a_training_that_was_asked_to_stop_is_not_done(path: Path, launches, capsys):
    """It ends in order, as one that is done does, but before its last step."""
    write_run(path.parent / "out" / "stage1", jobs(path)["stage1"], step=40)
    assert recipe.run(recipe.load(path)) == 1
    assert [Path(started).stem for _, started in launches()] == ["stage1"]
    assert "mtllm: error: stage1 was stopped after step 40 of 100; run the same" in capsys.readouterr().err
    (path.parent / "out" / "stage1" / "checkpoints" / "latest").unlink()
    (path.parent / "out" / "stage1" / "checkpoints" / "latest").symlink_to("step-00000100")
    (path.parent / "out" / "stage1" / "checkpoints" / "step-00000100").mkdir()
    assert recipe.run(recipe.load(path, ["recipe.seeds=[3]"])) == 0
    assert [Path(started).stem for _, started in launches()] == ["stage1", "finetune-3", "distil-3", "evaluate-3"]


def test_a_changed_step_that_is_done_is_refused_before_anything_runs(path: Path, launches):
    (path.parent / "fails").write_text("distil-3\n")
    recipe.run(recipe.load(path))
    launches()
    changed = recipe.load(path, ["finetune.optim.lr=1e-3"])
    message = error_of(lambda: recipe.run(changed))
    assert message.startswith("finetune-3 was made with other settings; remove ") and "recipe.dir" in message
    assert launches() == []
    not_done = recipe.load(path, ["distil.optim.lr=1e-3"])
    (path.parent / "fails").write_text("")
    assert recipe.run(not_done) == 0 and len(launches()) == 5


def test_ctrl_c_is_for_the_ranks_and_waited_for(path: Path, monkeypatch, capsys):
    """Neither this process nor the launcher leaves before the ranks have saved."""
    hit = "kill -INT $PPID $$; exit 3"
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: ["sh", "-c", hit])
    without_files(monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    assert recipe.run(recipe.load(path)) == 3 and signal.getsignal(signal.SIGINT) == before
    assert "stage1 failed; run the same command again to go on from there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> Path:
    """A recipe whose files are all there, beside what it reads."""
    folder = build_models(tmp_path_factory.mktemp("topics"))
    write_topics(folder, "eng_Latn", train=4, dev=2, test=2)
    write_topics(folder, "swh_Latn", test=2)
    write_passages(folder / "squad" / "train-v1.1.json", 2, seed=0)
    write_passages(folder / "squad" / "xquad.en.json", 2, seed=0)
    text = TEXT.format(folder=folder / "out").replace("validation =", "#").replace('"nli"', '"sib200"')
    for before, after in (("mnli:data/mnli", "sib200:topics"), ("xnli:data/xnli", "sib200:topics")):
        text = text.replace(before, after.replace("topics", str(folder / "topics")))
    for name, path in (("nllb", "encoder"), ("llama", "decoder"), ("fineweb", "train")):
        text = text.replace(f'"{name}"', f'"{folder / path}"')
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("task.name=nil", "finetune-3: unknown task 'nil'; did you mean nli?"),
        ("task.test=sib:x", "evaluate-3: 'sib:x': write DATASET:FOLDER; data sets of sib200 are sib200"),
        ("task.train=sib200:/nope", "finetune-3: /nope has no data/annotated/eng_Latn/train.tsv nor "),
        ("task.validation=sib200:/nope", "finetune-3: /nope has no data/annotated/eng_Latn/dev.tsv nor "),
        ("evaluate.languages=xx", "evaluate-3: evaluate.languages has xx, which is in no test set of sib200:"),
        (
            "evaluate.systems=translate_test evaluate.translator=/nope",
            "evaluate-3: /nope is neither a folder nor a model the hub gives",
        ),
        ("distil.data.train=/nope", "distil-3: no manifest.json in /nope"),
        ("stage1.model.start=/nope", "stage1: /nope is no checkpoint of a run"),
        (
            "task.name=xquad task.train=squad:HERE/squad task.test=xquad:HERE/squad",
            "distil-3: task xquad asks for a piece of the text, which no pooled state holds",
        ),
    ],
)
def test_what_no_job_makes_must_be_there_before_the_first_runs(topics: Path, monkeypatch, overrides: str, message: str):
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: pytest.fail("a job was launched"))
    overrides = overrides.replace("HERE", str(topics.parent)).split()
    assert error_of(lambda: recipe.run(recipe.load(topics, overrides))).startswith(message)
    settings = [*overrides, "stage1.optim.steps=0,10", "distil.optim.lr=1e-3,2e-3"]
    if not overrides[0].startswith("stage1"):
        assert error_of(lambda: recipe.sweep(topics, settings)).startswith(message)


def test_what_jobs_make_need_not_be_there_yet(topics: Path):
    corpus = topics.parent / "out" / "finetune-3" / "corpus" / "train"
    pending = recipe.check(recipe.load(topics, [f"distil.data.train={corpus}", "recipe.seeds=[3]"]))
    assert [job.name for job in pending] == ["stage1", "finetune-3", "distil-3", "evaluate-3"]


PLAIN = st.text("abcXY01./_-", min_size=1, max_size=6)
VALUES = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=3).map(lambda items: f"[{','.join(items)}]"), st.just("{a=[1,2],b=3}")
)


@given(st.dictionaries(st.sampled_from(["a.b", "stage1.optim.steps", "c"]), st.lists(VALUES, min_size=1, max_size=4)))
def test_settings_are_parted_at_commas_outside_brackets(settings: dict[str, list[str]]):
    fixed, varied = recipe._varied([f"{key}={','.join(values)}" for key, values in settings.items()])
    assert varied == {key: values for key, values in settings.items() if len(values) > 1}
    assert fixed == [f"{key}={values[0]}" for key, values in settings.items() if len(values) == 1]


def test_a_sweep_needs_several_values(path: Path):
    assert "no key has several values" in error_of(lambda: recipe.sweep(path, ["stage1.optim.steps=10"]))


def test_every_combination_is_checked_before_the_first_runs(path: Path, launches):
    message = error_of(lambda: recipe.sweep(path, ["stage1.optim.steps=0,-1"]))
    assert message.startswith("stage1: optim.steps") and launches() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("stage1.optim.steps=0,", "stage1: optim.steps must be a whole number, not ''"),
        ("stage1.optim.steps=0,1 stage1.optim.steps=2,3", "stage1.optim.steps is set twice"),
        ("stage1.optim.steps=0,1 stage1.optim.steps=2", "stage1.optim.steps is set twice"),
        ("recipe.dir=here,there", "recipe.dir takes one value"),
        ("optim.lr=1,1", "two settings would share the folder"),
        ("optim.lr", "no key has several values"),
        (
            "optim.lr=1e-3,2e-3 distil.optim.lr=1e-3",
            "changes nothing: vary what overrides it, stage1.optim.lr or finetune.optim.lr or distil.optim.lr",
        ),
        (
            "optim.steps=0,9 lora.alpha=1,2",
            "optim.steps=0,9 changes nothing: vary what overrides it, stage1.optim.steps or finetune.optim.epochs or ",
        ),
        (
            "stage1.optim.steps=0 stage1.lora.rank=1,2",
            "stage1.lora.rank=1,2 changes nothing: no step that runs reads it",
        ),
    ],
)
def test_a_mistake_in_what_is_varied_is_told_before_anything_runs(path: Path, launches, settings: str, message: str):
    assert message in error_of(lambda: recipe.sweep(path, settings.split())) and launches() == []


def test_settings_are_named_by_the_shortest_end_that_tells_keys_apart(path: Path):
    varied = {"stage1.optim.lr": ["1e-3"], "distil.optim.lr": ["2e-3"], "model.decoder": ["a/b"]}
    (name,) = recipe._settings(path, [], varied, path.parent)
    assert name == "stage1.optim.lr=1e-3,distil.optim.lr=2e-3,decoder=b"


def test_settings_that_would_share_a_folder_are_refused(path: Path, launches):
    message = error_of(lambda: recipe.sweep(path, ["model.encoder=a/x,b/x"]))
    assert "encoder=x" in message and launches() == []


LANGUAGES = ("eng_Latn", "deu_Latn", "swh_Latn")
CORRECT = {"stack": (9, 6, 4), "llm": (10, 5, 1)}  # of 10, by language


def write_predictions(folder: Path, *, languages: tuple[str, ...] = LANGUAGES, better: int = 0) -> None:
    """As evaluation does; `better`: more right answers of the stack in each foreign language."""
    labels = np.arange(10) % 3
    for system, counts in CORRECT.items():
        for language, count in zip(languages, counts):
            count += better * (system == "stack" and language != "eng_Latn")
            found = {"keys": [str(number) for number in range(10)], "labels": labels}
            found |= {"predictions": np.where(np.arange(10) < count, labels, (labels + 1) % 3), "num_classes": 3}
            found |= {"metric": "accuracy", "gpu_hours": 2.0 + better, "flops": 1e15 * (1 + better), "latency_s": None}
            results.save(folder, Predictions(system=system, dataset="xnli", language=language, seed=3, **found))


def test_a_sweeps_points_are_averages_over_foreign_languages(path: Path):
    made = recipe.load(path)
    write_predictions(made.results)
    points = {point["system"]: point for point in recipe._points(made)}
    assert points["stack"]["value"] == pytest.approx(0.5) and points["llm"]["value"] == pytest.approx(0.3)
    for point in points.values():
        assert (point["dataset"], point["measure"], point["gpu_hours"], point["flops"]) == (
            "xnli",
            "accuracy",
            2.0,
            1e15,
        )
        assert point["low"] <= point["value"] <= point["high"]


@pytest.fixture
def evaluated(path: Path, launches) -> Path:
    """A recipe's folder with the results of a sweep over stage 1's steps, whose jobs only have to be said done."""
    for better, steps in enumerate((0, 100, 1000)):
        write_predictions(path.parent / "out" / "sweep" / f"steps={steps}" / "results", better=better)
    return path


def test_a_sweeps_table(evaluated: Path, launches, capsys):
    assert recipe.sweep(evaluated, ["stage1.optim.steps=0,100,1000", "recipe.seeds=[3]"]) == 0
    assert [Path(started).stem for _, started in launches()] == [
        *("finetune-3", "distil-3", "evaluate-3"),
        *("stage1", "distil-3", "evaluate-3") * 2,  # the LLM is fine-tuned alike in all settings
    ]
    out = evaluated.parent / "out"
    with (out / "sweep.csv").open() as file:
        points = list(csv.DictReader(file))
    order = itertools.product(("steps=0", "steps=100", "steps=1000"), ("llm", "stack"))
    assert [(point["setting"], point["system"]) for point in points] == list(order)
    stack = [point for point in points if point["system"] == "stack"]
    assert [float(point["value"]) for point in stack] == pytest.approx([0.5, 0.6, 0.7])
    assert [float(point["flops"]) for point in stack] == pytest.approx([1e15, 2e15, 3e15])
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out
    assert "| steps=100 | xnli | accuracy | stack | 60.0 [" in table and table.count("\n") == 2 + len(points)
    assert os.path.getsize(out / "sweep.png") > 1000


def test_what_settings_have_in_common_is_made_once(evaluated: Path, launches):
    """Stage 1 too, where only what follows differs; and never of a run that has its folder."""
    out = evaluated.parent / "out" / "sweep"
    write_run(out / "lr=1e-3" / "stage1", jobs(evaluated)["stage1"], step=100)
    write_run(out / "lr=1e-3" / "finetune-3", jobs(evaluated)["finetune-3"], step=0)
    for value in ("1e-3", "2e-3"):
        write_predictions(out / f"lr={value}" / "results")
    settings = ["distil.optim.lr=1e-3,2e-3", "recipe.seeds=[3]"]
    assert recipe.sweep(evaluated, settings) == 0
    assert [Path(started).relative_to(out).with_suffix("") for _, started in launches()] == [
        *(Path("lr=1e-3") / name for name in ("stage1", "finetune-3", "distil-3", "evaluate-3")),
        *(Path("lr=2e-3") / name for name in ("distil-3", "evaluate-3")),
    ]
    assert (out / "lr=2e-3" / "stage1").resolve() == out / "lr=1e-3" / "stage1"
    assert recipe.sweep(evaluated, settings) == 0 and launches() == []


@pytest.mark.parametrize("given", ["", "mine"])
def test_all_settings_of_a_sweep_share_their_translations(evaluated: Path, launches, given: str):
    """In a folder of the sweep, or the one that the recipe has."""
    if given:
        evaluated.write_text(evaluated.read_text().replace("[evaluate]", f'[evaluate]\ntranslations = "{given}"'))
    assert recipe.sweep(evaluated, ["stage1.optim.steps=0,100", "recipe.seeds=[3, 4]"]) == 0
    sweep = evaluated.parent / "out" / "sweep"
    found = [configs.load(path).evaluate for path in sweep.glob("*/evaluate-*.toml")]
    assert len(found) == 4 and {each.translations for each in found} == {given or str(sweep / "translations")}
    assert jobs(evaluated)["evaluate-3"].evaluate.translations == given


def test_a_failing_setting_stops_a_sweep(evaluated: Path, launches):
    (evaluated.parent / "fails").write_text("stage1\n")
    assert recipe.sweep(evaluated, ["stage1.optim.steps=0,100,1000", "recipe.seeds=[3]"]) == 1
    assert len(launches()) == 3 + 1 and not (evaluated.parent / "out" / "sweep.csv").exists()


def test_a_sweep_in_english_alone_says_so(path: Path, launches):
    for steps in (0, 100):
        folder = path.parent / "out" / "sweep" / f"steps={steps}" / "results"
        write_predictions(folder, languages=("eng_Latn",))
    assert "foreign language" in error_of(lambda: recipe.sweep(path, ["stage1.optim.steps=0,100"]))


def point(setting: str, measure: str, system: str, value: float, flops: float | None) -> dict:
    costs = {"latency_s": None, "gpu_hours": 3.0, "flops": flops}
    return {"setting": setting, "dataset": "xnli", "measure": measure, "system": system, "value": value} | {
        **{"low": value - 0.1, "high": value + 0.1},
        **costs,
    }


def test_each_measure_has_a_panel_and_each_place_one_label(tmp_path: Path, monkeypatch):
    """Systems that settings leave alone have one point; hours are no FLOPs."""
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    points = [
        point(setting, measure, system, value, flops)
        for setting, more in (("steps=0", 0.0), ("steps=9", 0.2))
        for measure, value in (("accuracy", 0.5), ("macro_f1", 0.3))
        for system, value, flops in (
            ("llm", value, 1e12),
            ("stack", value + more, 2e12 + more),
            ("unknown", value, None),
        )
    ]
    recipe.plot_compute(points, tmp_path / "sweep")
    (figure,) = shown
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == ["xnli: accuracy", "xnli: macro f1"]
    for axis in figure.axes:
        assert sorted(text.get_text() for text in axis.texts) == ["all settings", "steps=0", "steps=9"]
        assert axis.get_xlim()[0] == 0 and axis.get_xlabel() == "FLOPs to make"
    table = (tmp_path / "sweep.md").read_text()
    assert "| steps=9 | xnli | accuracy | stack | 70.0 [60.0, 80.0] | - | 3 | 2e+12 |" in table


def test_labels_of_settings_that_cost_the_same_stand_above_one_another(tmp_path: Path, monkeypatch):
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    settings = [(f"lr={number}", 0.5 + number / 1e4) for number in range(4)]
    recipe.plot_compute([point(name, "accuracy", "stack", value, 1e12) for name, value in settings], tmp_path / "sweep")
    (axis,) = shown[0].axes
    heights = [text.xy[1] for text in axis.texts]
    assert np.diff(heights).min() > 0.02 * np.diff(axis.get_ylim()) and len(heights) == 4


def test_a_value_outside_its_interval_is_drawn(tmp_path: Path):
    """An interval of resampled values need not hold the value itself."""
    point = {"setting": "a=1", "dataset": "xnli", "measure": "macro_f1", "system": "stack", "value": 0.5}
    costs = {"latency_s": None, "gpu_hours": None, "flops": None}
    recipe.plot_compute([point | {"low": 0.51, "high": 0.6} | costs], tmp_path / "sweep")
    assert (tmp_path / "sweep.png").is_file()
