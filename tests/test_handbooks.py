"""The README and the handbooks: all there, their links lead somewhere, no figure stands twice."""

import re
import subprocess
from collections import Counter
from itertools import chain

import pytest

from benchmarks import handbook as keys
from benchmarks import picture
from tests.support.handbooks import HANDBOOKS, anchors, blocks, links, path_of, prose, read
from tests.support.machine import ROOT

NUMBER = r"(?<![\w.,])\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER}) ?(x|%|pairs/s|[GMK]iB|GB|[um]?s|\[)(?![\w-])")
PROGRAM = re.compile(
    r"^\s*(?:[A-Z_]+=\S+ )*"
    r"(mtllm|python3?|pip|make|git|deepspeed|torchrun|sbatch|srun|hf|printf|source) ",
    re.MULTILINE,
)
LONGEST = 150  # lines of the README, which is a door


def test_every_handbook_is_known():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results = {name for name in files.stdout.split() if name.startswith("benchmarks/results/")}
    assert {*files.stdout.split()} - results == {*HANDBOOKS}


@pytest.mark.parametrize("handbook", HANDBOOKS)
def test_links_lead_somewhere(handbook: str):
    broken = []
    for link in links(handbook):
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = path_of(handbook, link) if path else ROOT / handbook
        if (
            not target.exists()
            or anchor
            and anchor not in anchors(str(target.resolve().relative_to(ROOT)))
        ):
            broken.append(link)
    assert not broken


def test_every_handbook_is_linked_from_the_readme():
    linked = {path_of("README.md", link).resolve() for link in links("README.md")}
    assert {ROOT / name for name in HANDBOOKS[1:]} <= linked


def test_the_readme_is_a_door():
    assert len(read("README.md").splitlines()) <= LONGEST


@pytest.mark.parametrize("handbook", HANDBOOKS)
def test_commands_stand_in_blocks_that_say_so(handbook: str):
    """Or the test that runs them would not find them."""
    assert all(block.language for block in blocks(handbook))
    others = [block.text for block in blocks(handbook) if block.language != "sh"]
    assert not [text for text in [*others, prose(handbook)] if PROGRAM.search(text)]


def figures(handbook: str) -> set[tuple[str, str]]:
    """What was measured: numbers with their units, or with an interval behind them."""
    found = FIGURE.findall(prose(handbook))
    return {(number, unit) for number, unit in found if unit != "%" or "." in number}


def test_figures_of_the_readme_stand_in_the_tables_that_it_links():
    results = prose("README.md").partition("## Three results")[2].partition("\n## ")[0]
    measured = {*re.findall(NUMBER, re.sub(r"\S*/\S*", "", results))} - {"8", "600"}
    assert len(measured) >= 6 and measured <= {*re.findall(NUMBER, read("benchmarks/README.md"))}


def test_the_table_of_the_quickstart_is_the_one_that_it_printed():
    rows = re.findall(r"^\|.*\d\.\d \[.*$", read("README.md"), re.MULTILINE)
    printed = (ROOT / "benchmarks" / "results" / "cpu" / "quickstart.md").read_text().splitlines()
    assert len(rows) == 8 and {*rows} <= {*printed}


def test_no_figure_stands_in_two_handbooks():
    """The README's aside, which are the benchmarks'."""
    counts = Counter(chain(*map(figures, HANDBOOKS[1:])))
    assert not {each for each, count in counts.items() if count > 1} - ALIKE


ALIKE = {("0.98", "x"), ("1.5", "x")}
"""Figures that are the same by chance."""


def test_the_keys_are_those_of_the_code():
    text = keys.HANDBOOK.read_text("utf-8")
    assert keys.written(text) == text, "run python -m benchmarks.handbook"
    assert keys.written(text.replace("| `seed` |", "| `sead` |")) == text


def test_the_picture_is_drawn(tmp_path):
    out = tmp_path / "picture.svg"
    assert picture.main(["--out", str(out)]) == 0
    assert out.read_text().count("<path") == picture.OUT.read_text().count("<path")


def test_the_readme_installs_the_tested_torch():
    (version,) = re.findall(
        r"^pip install torch==(\S+) --index-url", read("README.md"), re.MULTILINE
    )
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text()
