"""A recipe at every combination of settings: what is run once, what is refused, what is shown."""

import csv
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from mtllm_engine import config as configs
from mtllm_engine import recipe
from mtllm_engine.evaluation.predictions import Predictions, save
from mtllm_engine.evaluation.tables import plot_compute
from mtllm_engine.sweep import _points, _settings, _varied, sweep
from tests.support.recipes import error_of, jobs, record_launches, write_recipe, write_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe."""
    return write_recipe(tmp_path)


@pytest.fixture
def launches(tmp_path: Path, monkeypatch) -> Callable[[], list[tuple[str, str]]]:
    """What was started since the last call; a job fails whose name is in the file `fails`."""
    return record_launches(tmp_path, monkeypatch)


PLAIN = st.text("abcXY01./_-", min_size=1, max_size=6)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    st.just("{a=[1,2],b=3}"),
)


@given(
    st.dictionaries(
        st.sampled_from(["a.b", "stage1.optim.steps", "c"]),
        st.lists(VALUES, min_size=1, max_size=4),
    )
)
def test_settings_are_parted_at_commas_outside_brackets(settings: dict[str, list[str]]):
    fixed, varied = _varied([f"{key}={','.join(values)}" for key, values in settings.items()])
    assert varied == {key: values for key, values in settings.items() if len(values) > 1}
    assert fixed == [f"{key}={values[0]}" for key, values in settings.items() if len(values) == 1]


def test_a_sweep_needs_several_values(path: Path):
    message = error_of(lambda: sweep(path, ["stage1.optim.steps=10"]))
    assert "no key has several values" in message


def test_every_combination_is_checked_before_the_first_runs(path: Path, launches):
    message = error_of(lambda: sweep(path, ["stage1.optim.steps=0,-1"]))
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
            "optim.lr=1e-3,2e-3 stage2.optim.lr=1e-3",
            "changes nothing: vary what overrides it, stage1.optim.lr or finetune.optim.lr or "
            "stage2.optim.lr",
        ),
        (
            "optim.steps=0,9 lora.alpha=1,2",
            "optim.steps=0,9 changes nothing: vary what overrides it, stage1.optim.steps or "
            "finetune.optim.epochs or ",
        ),
        (
            "stage1.optim.steps=0 stage1.lora.rank=1,2",
            "stage1.lora.rank=1,2 changes nothing: no step that runs reads it",
        ),
    ],
)
def test_a_mistake_in_what_is_varied_is_told_before_anything_runs(
    path: Path, launches, settings: str, message: str
):
    assert message in error_of(lambda: sweep(path, settings.split())) and launches() == []


def test_settings_are_named_by_the_shortest_end_that_tells_keys_apart(path: Path):
    varied = {"stage1.optim.lr": ["1e-3"], "stage2.optim.lr": ["2e-3"], "model.decoder": ["a/b"]}
    (name,) = _settings(path, [], varied, path.parent)
    assert name == "stage1.optim.lr=1e-3,stage2.optim.lr=2e-3,decoder=b"


def test_settings_that_would_share_a_folder_are_refused(path: Path, launches):
    message = error_of(lambda: sweep(path, ["model.encoder=a/x,b/x"]))
    assert "encoder=x" in message and launches() == []


LANGUAGES = ("eng_Latn", "deu_Latn", "swh_Latn")
CORRECT = {"stack": (9, 6, 4), "llm": (10, 5, 1)}  # of 10, by language


def write_predictions(
    folder: Path, *, languages: tuple[str, ...] = LANGUAGES, better: int = 0
) -> None:
    """As evaluation does; `better`: more right answers of the stack in each foreign language."""
    keys, labels = [str(number) for number in range(10)], np.arange(10) % 3
    columns = {"keys": keys, "labels": labels, "num_classes": 3, "latency_s": None}
    costs = {"gpu_hours": 2.0 + better, "flops": 1e15 * (1 + better)}
    test = {"dataset": "xnli", "metric": "accuracy", "seed": 3}
    for system, counts in CORRECT.items():
        for language, count in zip(languages, counts):
            count += better * (system == "stack" and language != "eng_Latn")
            answers = np.where(np.arange(10) < count, labels, (labels + 1) % 3)
            about = {"system": system, "language": language, "predictions": answers}
            save(folder, Predictions(**about, **test, **columns, **costs))


def test_a_sweeps_points_are_averages_over_foreign_languages(path: Path):
    setting = recipe.load(path)
    write_predictions(setting.results)
    points = {point["system"]: point for point in _points(setting)}
    assert points["stack"]["value"] == pytest.approx(0.5)
    assert points["llm"]["value"] == pytest.approx(0.3)
    expected = {"dataset": "xnli", "measure": "accuracy", "gpu_hours": 2.0, "flops": 1e15}
    for point in points.values():
        assert expected.items() <= point.items()
        assert point["low"] <= point["value"] <= point["high"]


@pytest.fixture
def evaluated(path: Path, launches) -> Path:
    """The results of a sweep over stage 1's steps are there: jobs only have to be said done."""
    for better, steps in enumerate((0, 100, 1000)):
        folder = path.parent / "out" / "sweep" / f"steps={steps}"
        write_predictions(folder / "results", better=better)
    return path


def test_a_sweeps_table(evaluated: Path, launches, capsys):
    assert sweep(evaluated, ["stage1.optim.steps=0,100,1000", "recipe.seeds=[3]"]) == 0
    assert [Path(started).stem for _, started in launches()] == [
        *("finetune-3", "stage2-3", "evaluate-3"),
        *("stage1", "stage2-3", "evaluate-3") * 2,  # the LLM is fine-tuned alike in all settings
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
    assert "| steps=100 | xnli | accuracy | stack | 60.0 [" in table
    assert table.count("\n") == 2 + len(points)
    assert os.path.getsize(out / "sweep.png") > 1000


def test_what_settings_have_in_common_is_made_once(evaluated: Path, launches):
    """Stage 1 too, where only what follows differs; and never of a run that has its folder."""
    out = evaluated.parent / "out" / "sweep"
    write_run(out / "lr=1e-3" / "stage1", jobs(evaluated)["stage1"], step=100)
    write_run(out / "lr=1e-3" / "finetune-3", jobs(evaluated)["finetune-3"], step=0)
    for value in ("1e-3", "2e-3"):
        write_predictions(out / f"lr={value}" / "results")
    settings = ["stage2.optim.lr=1e-3,2e-3", "recipe.seeds=[3]"]
    assert sweep(evaluated, settings) == 0
    assert [Path(started).relative_to(out).with_suffix("") for _, started in launches()] == [
        *(Path("lr=1e-3") / name for name in ("stage1", "finetune-3", "stage2-3", "evaluate-3")),
        *(Path("lr=2e-3") / name for name in ("stage2-3", "evaluate-3")),
    ]
    assert (out / "lr=2e-3" / "stage1").resolve() == out / "lr=1e-3" / "stage1"
    assert sweep(evaluated, settings) == 0 and launches() == []


def test_both_starts_of_stage_2_share_stage_1_and_the_task(evaluated: Path, launches):
    out = evaluated.parent / "out" / "sweep"
    for start in ("stage1", "sum"):
        write_predictions(out / f"from={start}" / "results")
    assert sweep(evaluated, ["stage2.from=stage1,sum", "recipe.seeds=[3]"]) == 0
    assert [Path(started).relative_to(out).with_suffix("") for _, started in launches()] == [
        *(
            Path("from=stage1") / name
            for name in ("stage1", "finetune-3", "stage2-3", "evaluate-3")
        ),
        *(Path("from=sum") / name for name in ("stage2-3", "evaluate-3")),
    ]
    stage2 = configs.load(out / "from=sum" / "stage2-3.toml").model
    assert [Path(each).parts[-3] for each in stage2.init_from] == ["stage1", "finetune-3"]
    shared = {each: (out / "from=sum" / each).resolve() for each in ("stage1", "finetune-3")}
    assert shared == {each: out / "from=stage1" / each for each in shared}


@pytest.mark.parametrize("given", ["", "mine"])
def test_all_settings_of_a_sweep_share_their_translations(evaluated: Path, launches, given: str):
    """In a folder of the sweep, or the one that the recipe has."""
    if given:
        section = f'[evaluate]\ntranslations = "{given}"'
        evaluated.write_text(evaluated.read_text().replace("[evaluate]", section))
    assert sweep(evaluated, ["stage1.optim.steps=0,100", "recipe.seeds=[3, 4]"]) == 0
    folder = evaluated.parent / "out" / "sweep"
    sections = [configs.load(path).evaluate for path in folder.glob("*/evaluate-*.toml")]
    assert len(sections) == 4
    assert {each.translations for each in sections} == {given or str(folder / "translations")}
    assert jobs(evaluated)["evaluate-3"].evaluate.translations == given


def test_a_failing_setting_stops_a_sweep(evaluated: Path, launches):
    (evaluated.parent / "fails").write_text("stage1\n")
    assert sweep(evaluated, ["stage1.optim.steps=0,100,1000", "recipe.seeds=[3]"]) == 1
    assert len(launches()) == 3 + 1 and not (evaluated.parent / "out" / "sweep.csv").exists()


def test_a_sweep_in_english_alone_says_so(path: Path, launches):
    for steps in (0, 100):
        folder = path.parent / "out" / "sweep" / f"steps={steps}" / "results"
        write_predictions(folder, languages=("eng_Latn",))
    assert "foreign language" in error_of(lambda: sweep(path, ["stage1.optim.steps=0,100"]))


def point(setting: str, measure: str, system: str, value: float, flops: float | None) -> dict:
    about = {"setting": setting, "dataset": "xnli", "measure": measure, "system": system}
    interval = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return about | interval | {"latency_s": None, "gpu_hours": 3.0, "flops": flops}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures, save_figure = [], Figure.savefig

    def recording(figure: Figure, *arguments, **options) -> None:
        figures.append(figure)
        save_figure(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", recording)
    return figures


def test_each_measure_has_a_panel_and_each_place_one_label(tmp_path: Path, drawn: list[Figure]):
    """Systems that settings leave alone have one point; hours are no FLOPs."""
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
    plot_compute(points, tmp_path / "sweep")
    (figure,) = drawn
    titles = [axis.get_title().split(",")[0] for axis in figure.axes]
    assert titles == ["xnli: accuracy", "xnli: macro f1"]
    for axis in figure.axes:
        labels = sorted(text.get_text() for text in axis.texts)
        assert labels == ["all settings", "steps=0", "steps=9"]
        assert axis.get_xlim()[0] == 0 and axis.get_xlabel() == "FLOPs to make"
    table = (tmp_path / "sweep.md").read_text()
    assert "| steps=9 | xnli | accuracy | stack | 70.0 [60.0, 80.0] | - | 3 | 2e+12 |" in table


def test_labels_of_settings_that_cost_the_same_stand_above_one_another(
    tmp_path: Path, drawn: list[Figure]
):
    settings = [(f"lr={number}", 0.5 + number / 1e4) for number in range(4)]
    points = [point(name, "accuracy", "stack", value, 1e12) for name, value in settings]
    plot_compute(points, tmp_path / "sweep")
    (axis,) = drawn[0].axes
    heights = [text.xy[1] for text in axis.texts]
    assert np.diff(heights).min() > 0.02 * np.diff(axis.get_ylim()) and len(heights) == 4


def test_a_value_outside_its_interval_is_drawn(tmp_path: Path):
    """An interval of resampled values need not hold the value itself."""
    outside = point("a=1", "macro_f1", "stack", 0.5, None) | {"low": 0.51, "high": 0.6}
    plot_compute([outside | {"gpu_hours": None}], tmp_path / "sweep")
    assert (tmp_path / "sweep.png").is_file()
