"""A run's page: every language of the probe by its name, and a page for phones too."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from mtllm_engine.training import report
from mtllm_engine.training.report import language_label, write_report

NAMES = {"swh_Latn": "Swahili (swh_Latn)", "qaa_Latn": "qaa_Latn", "": "mean, English aside"}
MANY = ["eng_Latn", "swh_Latn", "qaa_Latn", *(f"q{a}{b}_Latn" for a in "bcd" for b in "abcdefghij")]


def write_run(folder: Path, languages: list[str]) -> Path:
    """A run of three measured steps, as training leaves it."""
    folder.mkdir()
    rows = []
    for step in (0, 1, 2):
        if step:
            rows.append({"step": step, "loss": 1 / step, "grad_norm": 1.0, "fvu": 1 / step})
            rows[-1] |= {"pairs_per_s": 10.0, "skipped": 0}
        rows.append({"step": step, "validation_fvu": 2 - step / 2, "validation_documents": 4})
        for name in report.PROBE if languages else ():
            figures = {f"probe_{name}/{each}": n + step for n, each in enumerate(languages)}
            rows.append({"step": step, f"probe_{name}": 0.5} | figures)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text('{"world_size": 1, "device": "CPU", "commit": null}')
    (folder / "config.toml").write_text('[run]\ndir = "<b>"\n')
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = write_run(tmp_path_factory.mktemp("report") / "run", ["swh_Latn", "qaa_Latn"])
    return write_report(folder).read_text()


def test_a_language_goes_by_its_name():
    assert {code: language_label(code) for code in NAMES} == NAMES


def test_the_table_names_languages_and_begins_with_the_mean(page: str):
    table = page[page.index("<table class=numbers>") :]
    assert re.findall("<tr><th>([^<]*)</th>(?=<td>)", table) == [
        "mean, English aside",
        "Swahili (swh_Latn)",
        "qaa_Latn",
    ]


def test_a_window_of_a_phone_gets_pictures_of_its_own(page: str):
    assert "name=viewport content='width=device-width,initial-scale=1'" in page
    pictures = re.findall(
        "<source media='\\(max-width:640px\\)' srcset='data:image/png;base64,([^']*)'>"
        "<img src='data:image/png;base64,([^']*)' alt='[^']+'></picture>",
        page,
    )
    assert len(pictures) == page.count("<img") == 2  # the curve and the probe
    for pair in pictures:
        small, large = (Image.open(io.BytesIO(base64.b64decode(each))).size for each in pair)
        assert small[0] / 200 < 4.5 and large[0] / 120 > 9  # inches, of letters of one size
    small = Image.open(io.BytesIO(base64.b64decode(pictures[1][0]))).size
    assert small[1] > 1.5 * small[0]  # one below the other


def test_what_is_wider_than_the_window_does_not_widen_the_page(page: str):
    style = page[page.index("<style>") : page.index("</style>")]
    assert "pre{overflow-x:auto" in style and "img{max-width:100%" in style
    assert "td{overflow-wrap:anywhere}" in style  # paths
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_without_a_probe_there_is_no_section_of_it(tmp_path: Path):
    page = write_report(write_run(tmp_path / "run", [])).read_text()
    assert "Cross-lingual" not in page and page.count("<img") == 1


@pytest.mark.parametrize("narrow", [None, io.BytesIO()])
def test_the_legend_says_which_line_is_which(tmp_path: Path, monkeypatch, narrow):
    """One entry a language, inside the picture, and no two lines look alike."""
    saved: list[Figure] = []
    monkeypatch.setattr(report, "_save", lambda figure, path, _: saved.append(figure) or path)
    report.plot_probe(write_run(tmp_path / "run", MANY), narrow)
    (figure,) = saved
    figure.canvas.draw()
    legend = figure.subfigs[1].legends[0]
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [*sorted(map(language_label, MANY)), "mean, English aside"]
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.y0 >= whole.y0 and box.x0 >= whole.x0 and box.x1 <= whole.x1
    axes = figure.subfigs[0].axes
    assert box.y1 <= min(axis.get_tightbbox().y0 for axis in axes) + 1
    for axis in axes:
        looks = {
            line.get_label(): (to_hex(line.get_color()), line.get_linestyle())
            for line in axis.lines
        }
        assert len(set(looks.values())) == len(looks) == len(MANY) + 1
        (line,) = (line for line in axis.lines if line.get_label() == "Swahili (swh_Latn)")
        assert list(line.get_ydata()) == [1, 2, 3]  # its own figures
