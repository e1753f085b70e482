"""One file for the whole method: which jobs it makes, of what, and which of them are run when."""

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mtllm_engine import config as configs
from mtllm_engine import files, recipe
from mtllm_engine.config import FOLLOWING
from mtllm_engine.sweep import sweep
from tests.support.recipes import (
    TEXT,
    error_of,
    jobs,
    record_launches,
    without_files,
    write_recipe,
    write_run,
)
from tests.support.stages import build_models, write_passages, write_topics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe."""
    return write_recipe(tmp_path)


@pytest.fixture
def launches(tmp_path: Path, monkeypatch) -> Callable[[], list[tuple[str, str]]]:
    """What was started since the last call; a job fails whose name is in the file `fails`."""
    return record_launches(tmp_path, monkeypatch)


def test_jobs_in_the_order_of_the_method(path: Path):
    loaded = recipe.load(path)
    assert loaded.gpus == 2 and loaded.folder == path.parent / "out"
    assert [(job.name, job.module) for job in loaded.jobs] == [
        ("stage1", "mtllm_engine.train"),
        ("finetune-3", "mtllm_engine.finetune"),
        ("stage2-3", "mtllm_engine.train"),
        ("evaluate-3", "mtllm_engine.evaluate"),
        ("finetune-4", "mtllm_engine.finetune"),
        ("stage2-4", "mtllm_engine.train"),
        ("evaluate-4", "mtllm_engine.evaluate"),
    ]


def test_each_step_reads_what_the_one_before_it_wrote(path: Path):
    """One start for all seeds; stage 2's teacher and what is evaluated are the best of the same."""
    by_name, out = jobs(path), str(path.parent / "out")
    stage1 = by_name["stage1"].model
    assert (stage1.init_from, stage1.teacher) == ((), "")
    for seed in (3, 4):
        steps = [by_name[f"{step}-{seed}"] for step in ("finetune", "stage2", "evaluate")]
        finetune, stage2, evaluate = (each.model for each in steps)
        assert (finetune.init_from, finetune.teacher) == ((), "")
        assert stage2.init_from == (f"{out}/stage1/checkpoints/latest", stage2.teacher)
        assert stage2.teacher == evaluate.teacher == f"{out}/finetune-{seed}/checkpoints/best"
        assert evaluate.init_from == (f"{out}/stage2-{seed}/checkpoints/best",)
        assert steps[2].evaluate.results == f"{out}/results"
        assert {each.run.seed for each in steps} == {seed}
    assert all(config.run.dir == f"{out}/{name}" for name, config in by_name.items())


def test_each_step_has_its_objective_and_its_task(path: Path):
    by_name = jobs(path)
    objectives = {name: each.objective for name, each in by_name.items()}
    kinds = {name: (each.kind, each.reader) for name, each in objectives.items()}
    assert kinds["stage1"] == kinds["stage2-3"] == ("distil", "stack")
    assert kinds["finetune-3"] == ("finetune", "llm")
    tasks = {name: each.task for name, each in by_name.items()}
    files = {name: (task.name, task.train, task.test) for name, task in tasks.items()}
    assert files["stage1"] == ("", "", ())
    assert files["finetune-3"] == files["stage2-3"] == ("nli", "mnli:data/mnli", ())
    assert files["evaluate-3"] == ("nli", "", ("xnli:data/xnli",))
    assert by_name["stage1"].data.train == ("fineweb",)
    assert all(each.data.train == () for name, each in by_name.items() if name != "stage1")


def test_a_steps_own_tables_are_laid_over_the_shared_ones(path: Path):
    own = ["finetune.lora.rank=2", "stage2.data.max_length=64"]
    by_name = jobs(path, "optim.weight_decay=0.5", "stage2.from=stage1", *own)
    sections = {name: each.optim for name, each in by_name.items()}
    optim = {name: (each.steps, each.epochs, each.lr) for name, each in sections.items()}
    assert optim["stage1"] == (100, 0.0, 2e-4)
    assert optim["finetune-3"] == optim["finetune-4"] == (0, 3.0, 1e-4)
    assert optim["stage2-3"] == (0, 5.0, configs.OptimConfig().lr)
    assert {each.weight_decay for each in sections.values()} == {0.5}
    ranks = {name: each.lora.rank for name, each in by_name.items()}
    assert ranks["finetune-3"] == 2 and ranks["stage1"] == ranks["stage2-3"] == 8
    lengths = {name: each.data.max_length for name, each in by_name.items()}
    # The stack is tested as it was distilled.
    assert lengths["stage2-3"] == lengths["evaluate-3"] == 64
    assert lengths["stage1"] == lengths["finetune-3"] == 128
    assert by_name["stage2-3"].validation.every == 50
    assert by_name["evaluate-3"].evaluate.systems == ("stack",)


def test_without_stage_1_the_stack_starts_anew(path: Path):
    by_name = jobs(path, "stage1.optim.steps=0", "recipe.seeds=[7]")
    assert list(by_name) == ["finetune-7", "stage2-7", "evaluate-7"]
    assert by_name["stage2-7"].model.init_from == ()


def test_a_shared_number_of_steps_leaves_those_alone_that_set_epochs(path: Path):
    """0 is no stage 1, where it has no number of its own."""
    path.write_text(path.read_text().replace("steps = 100\n", ""))
    assert list(jobs(path, "optim.steps=0", "recipe.seeds=[7]")) == [
        "finetune-7",
        "stage2-7",
        "evaluate-7",
    ]
    by_name = jobs(path, "optim.steps=30")
    optim = {name: (config.optim.steps, config.optim.epochs) for name, config in by_name.items()}
    assert (optim["stage1"], optim["finetune-3"], optim["stage2-3"]) == (
        (30, 0.0),
        (0, 3.0),
        (0, 5.0),
    )
    for own in ("stage1.optim.epochs=2.0", "optim.epochs=2.0"):
        stage1 = jobs(path, "optim.steps=0", own)["stage1"].optim
        assert (stage1.steps, stage1.epochs) == (0, 2.0)
    assert "stage1" not in jobs(path, "optim.epochs=2.0", "stage1.optim.steps=0")


@pytest.mark.parametrize(
    ("steps", "starts"), [(100, ["mine", "", "OUT/stage1/checkpoints/latest"]), (0, ["", "mine"])]
)
def test_the_stacks_first_step_starts_from_a_shared_start(
    path: Path, steps: int, starts: list[str]
):
    """The LLM that learns the task does not: these are a stack's adapters."""
    own = ["model.init_from=mine", f"stage1.optim.steps={steps}", "recipe.seeds=[7]"]
    by_name = jobs(path, "stage2.from=stage1", *own)
    starts_of = ["".join(config.model.init_from) for config in by_name.values()]
    origins = [each.replace(f"{path.parent}/out", "OUT") for each in starts_of]
    assert origins == [*starts, "OUT/stage2-7/checkpoints/best"]
    by_name = jobs(path, "model.init_from=mine", "finetune.model.init_from=own")
    assert by_name["finetune-3"].model.init_from == ("own",)


SYSTEMS = ("llm", "translate_test", "stack")


def evaluating_all(path: Path) -> None:
    """The recipe does not say which systems are evaluated."""
    path.write_text(path.read_text().replace('systems = ["stack"]', ""))


@pytest.mark.parametrize("start", ["stage1", "sum"])
def test_the_sum_is_evaluated_where_there_is_something_to_add(path: Path, start: str):
    """Stage 1, or a start that the recipe has; whatever stage 2 starts from."""
    evaluating_all(path)
    out, begin = f"{path.parent}/out", f"stage2.from={start}"
    latest = f"{out}/stage1/checkpoints/latest"
    given = ["stage1.optim.steps=0", "model.init_from=['mine', 'ours']"]
    for overrides, stage1 in (
        ([], (latest,)),
        (["model.init_from=mine"], (latest,)),
        (given, ("mine", "ours")),
        (["stage2.model.init_from=mine"], ("mine",)),
    ):
        by_name = jobs(path, begin, *overrides)
        for seed in (3, 4):
            evaluated = by_name[f"evaluate-{seed}"]
            assert set(evaluated.evaluate.systems) == {*SYSTEMS, "sum"}
            assert evaluated.evaluate.stage1 == stage1
            assert evaluated.model.teacher == f"{out}/finetune-{seed}/checkpoints/best"
    own = jobs(path, begin, "evaluate.systems=['sum']", "evaluate.stage1=own")[
        "evaluate-3"
    ].evaluate
    assert (own.systems, own.stage1) == (("sum",), ("own",))


def test_without_stage_1_there_is_no_sum(path: Path):
    evaluating_all(path)
    by_name = jobs(path, "stage1.optim.steps=0")
    evaluated, stage2 = by_name["evaluate-3"].evaluate, by_name["stage2-3"]
    assert (evaluated.systems, evaluated.stage1) == (SYSTEMS, ())
    assert (stage2.model.init_from, stage2.lora.rank) == ((), 8)
    for start in ("stage1", "sum"):
        message = error_of(partial(jobs, path, "stage1.optim.steps=0", f"stage2.from={start}"))
        assert message.startswith(f"stage2.from = '{start}', and there is no stage 1")


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        ([], ("OUT/stage1/checkpoints/latest",)),
        (["model.init_from=mine"], ("OUT/stage1/checkpoints/latest",)),
        (["stage2.model.init_from=mine"], ("mine",)),
        (["stage2.model.init_from=['mine', 'ours']"], ("mine", "ours")),
        (["stage1.optim.steps=0", "stage2.model.init_from=mine"], ("mine",)),
        (["stage1.optim.steps=0", "model.init_from=['mine', 'ours']"], ("mine", "ours")),
    ],
)
def test_stage_2_starts_from_stage_1_or_from_its_sum_with_the_task(
    path: Path, overrides: list[str], starts: tuple[str, ...]
):
    """Of its own seed; nothing else differs but the adapters' shape."""
    out = f"{path.parent}/out"
    starts = tuple(each.replace("OUT", out) for each in starts)
    from_stage1, from_sum, unsaid = (
        jobs(path, *begin, *overrides)
        for begin in (["stage2.from=stage1"], ["stage2.from=sum"], [])
    )
    assert unsaid in (from_stage1, from_sum)
    for seed in (3, 4):
        task = f"{out}/finetune-{seed}/checkpoints/best"
        before, after = (each[f"stage2-{seed}"] for each in (from_stage1, from_sum))
        assert before.model.init_from == starts
        assert after.model.init_from == (*starts, task) and after.model.teacher == task
        assert (after.lora.rank, after.lora.alpha, after.lora.target_modules) == (0, 0.0, ())
        assert before.lora.rank == 8
        lora = replace(after.lora, **{key: getattr(before.lora, key) for key in FOLLOWING})
        model = replace(after.model, init_from=before.model.init_from)
        assert replace(after, lora=lora, model=model) == before
    rest = [name for name in from_sum if not name.startswith("stage2")]
    assert all(from_sum[name] == from_stage1[name] for name in rest)


def test_stage_2s_own_adapters_are_laid_over_the_sums(path: Path):
    own = ["stage2.lora.train=first", "stage2.lora.alpha=3.0", "lora.dropout=0.2"]
    by_name = jobs(path, "stage2.from=sum", *own)
    lora = by_name["stage2-3"].lora
    assert (lora.rank, lora.alpha, lora.train, lora.dropout) == (0, 3.0, "first", 0.2)
    assert by_name["stage1"].lora.rank == by_name["finetune-3"].lora.rank == 8
    assert by_name["stage1"].lora.train == by_name["finetune-3"].lora.train == "all"
    lora = jobs(path, "stage2.from=sum", "stage2.lora.rank=16")["stage2-3"].lora
    assert lora.rank == 16


def test_stored_targets_of_a_sum_are_of_its_teacher(path: Path):
    """The same states serve both starts: what teaches is the fine-tuned LLM."""
    names = set()
    for start in ("stage1", "sum"):
        stored = [f"stage2.from={start}", "stage2.data.teacher_states=t"]
        by_name = jobs(path, *stored)
        assert by_name["targets-3"] == by_name["stage2-3"]
        names.add(by_name["targets-3"].data.teacher_states)
    assert len(names) == 1


def test_stored_targets_are_a_job_before_stage_2(path: Path):
    """Of stage 2's own configuration, so that what is written is what is read."""
    loaded = recipe.load(path, ["stage2.data.teacher_states=teacher", "recipe.seeds=[7]"]).jobs
    assert [job.name for job in loaded] == [
        "stage1",
        "finetune-7",
        "targets-7",
        "stage2-7",
        "evaluate-7",
    ]
    targets, stage2 = loaded[2:4]
    assert targets.module == "mtllm_engine.targets" and targets.config == stage2.config
    assert re.fullmatch("teacher-7-[0-9a-f]{8}", stage2.config.data.teacher_states)


def test_targets_of_another_teacher_have_another_name(path: Path):
    """They lie beside corpora that seeds and settings share; a teacher that two settings share is
    stored once.
    """

    def names(*overrides: str) -> list[str]:
        by_name = jobs(
            path, "stage2.data.teacher_states=t", f"recipe.dir={path.parent / 'more'}", *overrides
        )
        return [
            config.data.teacher_states
            for name, config in by_name.items()
            if name.startswith("targets")
        ]

    first = names()
    assert [name[:4] for name in first] == ["t-3-", "t-4-"]
    assert names("stage2.optim.lr=1e-3", "recipe.dir=elsewhere") == first
    others = (
        "finetune.optim.lr=1e-3",
        "lora.rank=4",
        "stage2.data.max_length=64",
        "stage2.model.causal=true",
    )
    assert len({*first, *(name for other in others for name in names(other))}) == 2 + 2 * len(
        others
    )


def test_without_a_validation_set_the_last_checkpoints_are_taken(path: Path):
    """None is the best there."""
    path.write_text("".join(line for line in path.open() if not line.startswith("validation")))
    by_name = jobs(path)
    assert (
        Path(by_name["stage2-3"].model.teacher).name
        == Path(*by_name["evaluate-3"].model.init_from).name
        == "latest"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.optim.lrr=1", "stage1: unknown key: optim.lrr; did you mean optim.lr?"),
        ("finetune.optim.epochs=-1", "finetune-3: optim.steps and optim.epochs must be 0 or above"),
        ("stage2.lora.target_modules=[1]", "stage2-3: lora.target_modules[0] must be a string"),
        ("evaluate.systems=[]", "evaluate-3: evaluate.systems is empty"),
        ("stage2.optim=1", "stage2.optim must be a section, not 1"),
        ("stage2=1", "stage2 must be a section, not 1"),
        ("stage2.from=stage2", "stage2.from must be one of sum, stage1, not 'stage2'"),
        ("stage2.from=['sum']", "stage2.from must be one of sum, stage1, not ['sum']"),
        ("stage1.from=sum", "stage1.from must be a section, not 'sum'"),
        ("finetune.lora.train=first", 'finetune-3: lora.train = "first" is for a sum'),
        ("model.encoderr=a", "stage1: unknown key: model.encoderr; did you mean model.encoder?"),
        ("optim=1", "optim must be a section, not 1"),
        ("recipe=1", "recipe must be a section, not 1"),
        ("recipe.seed=1", "unknown key: recipe.seed; there are dir, gpus, seeds"),
        ("recipe.gpus=two", "recipe.gpus must be of type int, not 'two'"),
        ("recipe.gpus=0", "recipe.gpus must be at least 1"),
        ("recipe.seeds=[]", "recipe.seeds must be a list of whole numbers"),
        ("recipe.dir=''", "recipe.dir is empty"),
        ("recipe.seeds=[true]", "recipe.seeds must be a list of whole numbers"),
        ("recipe.seeds=[1, 1]", "recipe.seeds=[1, 1] has one of them twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_step(path: Path, override: str, message: str):
    assert message in error_of(lambda: recipe.load(path, [override]))


def test_a_recipe_without_a_folder_is_refused(path: Path):
    path.write_text(path.read_text().replace("dir =", "gpus = 1 #").replace("gpus = 2", ""))
    assert error_of(lambda: recipe.load(path)) == f"missing key: recipe.dir in {path}"


def test_what_is_done_is_not_run_again(path: Path, launches, capsys):
    loaded = recipe.load(path)
    assert recipe.run(loaded) == 0
    assert launches() == [(job.module, f"{loaded.folder}/{job.name}.toml") for job in loaded.jobs]
    for job in loaded.jobs:
        assert configs.load(loaded.folder / f"{job.name}.toml") == job.config
    assert recipe.run(recipe.load(path)) == 0 and launches() == []
    assert f"all steps are done: {loaded.results / 'results.md'}" in capsys.readouterr().out
    assert recipe.run(recipe.load(path, ["recipe.seeds=[3, 4, 5]"])) == 0
    assert [Path(started).stem for _, started in launches()] == [
        "finetune-5",
        "stage2-5",
        "evaluate-5",
    ]


def test_a_failure_stops_the_recipe_and_the_same_command_goes_on_from_there(
    path: Path, launches, capsys
):
    fails = path.parent / "fails"
    fails.write_text("stage2-3\n")
    assert recipe.run(recipe.load(path)) == 1
    assert [Path(started).stem for _, started in launches()] == ["stage1", "finetune-3", "stage2-3"]
    assert "mtllm: error: stage2-3 failed; run the same command again" in capsys.readouterr().err
    fails.write_text("")
    assert recipe.run(recipe.load(path)) == 0
    started = [Path(started).stem for _, started in launches()]
    assert started == ["stage2-3", "evaluate-3", "finetune-4", "stage2-4", "evaluate-4"]


def test_a_training_that_was_asked_to_stop_is_not_done(path: Path, launches, capsys):
    """It ends in order, as one that is done does, but before its last step."""
    write_run(path.parent / "out" / "stage1", jobs(path)["stage1"], step=40)
    assert recipe.run(recipe.load(path)) == 1
    assert [Path(started).stem for _, started in launches()] == ["stage1"]
    assert (
        "mtllm: error: stage1 was stopped after step 40 of 100; run the same"
        in capsys.readouterr().err
    )
    (path.parent / "out" / "stage1" / "checkpoints" / "latest").unlink()
    (path.parent / "out" / "stage1" / "checkpoints" / "latest").symlink_to("step-00000100")
    (path.parent / "out" / "stage1" / "checkpoints" / "step-00000100").mkdir()
    assert recipe.run(recipe.load(path, ["recipe.seeds=[3]"])) == 0
    assert [Path(started).stem for _, started in launches()] == [
        "stage1",
        "finetune-3",
        "stage2-3",
        "evaluate-3",
    ]


def test_a_changed_step_that_is_done_is_refused_before_anything_runs(path: Path, launches):
    (path.parent / "fails").write_text("stage2-3\n")
    recipe.run(recipe.load(path))
    launches()
    changed = recipe.load(path, ["finetune.optim.lr=1e-3"])
    message = error_of(lambda: recipe.run(changed))
    assert (
        message.startswith("finetune-3 was made with other settings; remove ")
        and "recipe.dir" in message
    )
    assert launches() == []
    not_done = recipe.load(path, ["stage2.optim.lr=1e-3"])
    (path.parent / "fails").write_text("")
    assert recipe.run(not_done) == 0 and len(launches()) == 5


def test_a_training_that_reached_its_end_with_other_settings_is_not_taken_for_this_one(
    path: Path, launches
):
    """Killed behind its last step, before it was marked; more steps would continue it."""
    (path.parent / "fails").write_text("stage1\n")
    recipe.run(recipe.load(path))
    write_run(path.parent / "out" / "stage1", jobs(path)["stage1"], step=100)
    launches()
    message = error_of(lambda: recipe.run(recipe.load(path, ["stage1.optim.lr=1e-3"])))
    assert message.startswith("stage1: it was made with other settings (optim.lr was 0.0002 and is")
    assert message.endswith("to train again, or set recipe.dir") and launches() == []
    (path.parent / "fails").write_text("")
    longer = recipe.load(path, ["stage1.optim.lr=1e-3", "stage1.optim.steps=200"])
    assert [job.name for job in recipe.check(longer)][0] == "stage1"
    assert recipe.run(recipe.load(path, ["recipe.seeds=[3]"])) == 0 and len(launches()) == 4


@pytest.mark.parametrize("kind", ["stale", "folder", "file"])
def test_best_of_a_job_that_is_done_is_repaired_before_the_next_reads_it(
    path: Path, launches, kind: str
):
    """Killed between its last links, or copied."""
    (path.parent / "fails").write_text("stage2-3\n")
    run = path.parent / "out" / "finetune-3"
    write_run(run, jobs(path)["finetune-3"], step=2)
    folder = run / "checkpoints"
    for step, score in ((1, 0.2), (2, 0.7)):
        record = files.sealed({"step": step, "score": score})
        (folder / f"step-{step:08d}").mkdir(exist_ok=True)
        (folder / f"step-{step:08d}" / "state.json").write_bytes(record)
    (run / "config.toml").unlink()
    made = recipe.load(path)
    recipe.mark_done(made, made.jobs[0]), recipe.mark_done(made, made.jobs[1])
    if kind == "stale":
        (folder / "best").symlink_to("step-00000001")
    elif kind == "folder":
        shutil.copytree(folder / "step-00000002", folder / "best")
    else:
        (folder / "best").write_text("step-00000001")
    assert recipe.run(made) == 1
    assert (folder / "best").is_symlink() and (folder / "best").readlink() == Path("step-00000002")


def test_ctrl_c_is_for_the_ranks_and_waited_for(path: Path, monkeypatch, capsys):
    """Neither this process nor the launcher leaves before the ranks have saved."""
    hit = "kill -INT $PPID $$; exit 3"
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: ["sh", "-c", hit])
    without_files(monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    assert recipe.run(recipe.load(path)) == 3 and signal.getsignal(signal.SIGINT) == before
    assert (
        "stage1 failed; run the same command again to go on from there" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> Path:
    """A recipe whose files are all there, beside what it reads."""
    folder = build_models(tmp_path_factory.mktemp("topics"))
    write_topics(folder, "eng_Latn", train=4, dev=2, test=2)
    write_topics(folder, "swh_Latn", test=2)
    write_passages(folder / "squad" / "train-v1.1.json", 2, seed=0)
    write_passages(folder / "squad" / "xquad.en.json", 2, seed=0)
    text = (
        TEXT.format(folder=folder / "out").replace("validation =", "#").replace('"nli"', '"sib200"')
    )
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
        (
            "task.test=sib:x",
            "evaluate-3: 'sib:x': write DATASET:FOLDER; data sets of sib200 are sib200",
        ),
        (
            "task.train=sib200:/nope",
            "finetune-3: /nope has no data/annotated/eng_Latn/train.tsv nor ",
        ),
        (
            "task.validation=sib200:/nope",
            "finetune-3: /nope has no data/annotated/eng_Latn/dev.tsv nor ",
        ),
        (
            "evaluate.languages=xx",
            "evaluate-3: evaluate.languages has xx, which is in no test set of sib200:",
        ),
        (
            "evaluate.systems=translate_test evaluate.translator=/nope",
            "evaluate-3: /nope is neither a folder nor a model",
        ),
        ("stage2.data.train=/nope", "stage2-3: no manifest.json in /nope"),
        ("stage1.model.init_from=/nope", "stage1: /nope is no checkpoint of a run"),
        (
            "stage2.from=sum stage2.model.init_from=/nope",
            "stage2-3: /nope is no checkpoint of a run",
        ),
        ("evaluate.stage1=/nope", "evaluate-3: /nope is no checkpoint of a run"),
        (
            "task.name=xquad task.train=squad:HERE/squad task.test=xquad:HERE/squad",
            "stage2-3: task xquad asks for a piece of the text, which no pooled state holds",
        ),
    ],
)
def test_what_no_job_makes_must_be_there_before_the_first_runs(
    topics: Path, monkeypatch, overrides: str, message: str
):
    monkeypatch.setattr(recipe, "launcher", lambda module, gpus: pytest.fail("a job was launched"))
    overrides = overrides.replace("HERE", str(topics.parent)).split()
    assert error_of(lambda: recipe.run(recipe.load(topics, overrides))).startswith(message)
    settings = [*overrides, "stage1.optim.steps=0,10", "stage2.optim.lr=1e-3,2e-3"]
    if not overrides[0].startswith("stage1"):
        assert error_of(lambda: sweep(topics, settings)).startswith(message)


@pytest.mark.parametrize("start", ["stage1", "sum"])
def test_what_jobs_make_need_not_be_there_yet(topics: Path, start: str):
    corpus = topics.parent / "out" / "finetune-3" / "corpus" / "train"
    overrides = [f"stage2.data.train={corpus}", f"stage2.from={start}", "recipe.seeds=[3]"]
    pending = recipe.check(recipe.load(topics, overrides))
    assert [job.name for job in pending] == ["stage1", "finetune-3", "stage2-3", "evaluate-3"]


def test_what_stage_2_draws_from_is_not_evaluations(path: Path):
    """The task's corpus and another, mixed, read as long texts."""
    own = ["stage2.data.train=[fineweb]", "stage2.data.mixture=[2,1]", "stage2.data.max_length=64"]
    by_name = jobs(path, *(each.replace("fineweb", '"fineweb"') for each in own))
    assert by_name["stage2-3"].data.mixture == (2.0, 1.0)
    data = by_name["evaluate-3"].data
    assert (data.train, data.mixture, data.max_length) == ((), (), 64)
