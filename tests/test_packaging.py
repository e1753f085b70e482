"""`mtllm_engine.kernels` finds the ops, and these find their sources in `csrc/`, however the
project came: editable, wheel, bare checkout, from any directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine import ROOT

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
SOURCES = sorted(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.*"))
SHOW = "import mtllm_engine.kernels as k; print(*k.discover()); print(*k.__path__)"
SHOW_SOURCES = (
    "from mtllm_engine.kernels.native import CSRC;"
    "print(*sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob('*.*'))); print(CSRC)"
)


def ops_and_folder(
    cwd: Path, *, search: Path | None, program: str = SHOW
) -> tuple[list[str], Path]:
    """Runs a program; `search` alone is on the path, or (None) the installed project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if search is not None:
        environment["PYTHONPATH"] = str(search)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    ops, folder = done.stdout.strip().splitlines()[-2:]
    return ops.split(), Path(folder)


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory) -> Path:
    """The wheel of the project, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", str(wheel), str(folder / "site")], check=True
    )
    return folder / "site"


def test_editable(tmp_path: Path):
    ops, folder = ops_and_folder(tmp_path, search=None)
    assert ops == OPS and folder == ROOT / "kernels"


def test_wheel(wheel_site: Path, tmp_path: Path):
    ops, folder = ops_and_folder(tmp_path, search=wheel_site)
    assert ops == OPS and folder == wheel_site / "mtllm_engine" / "kernels"


def test_bare_checkout_from_its_root():
    ops, folder = ops_and_folder(ROOT, search=ROOT)
    assert ops == OPS and folder == ROOT / "kernels"


def test_bare_checkout_from_elsewhere(tmp_path: Path):
    ops, folder = ops_and_folder(tmp_path, search=ROOT)
    assert ops == OPS and folder == ROOT / "kernels"


def test_sources_of_native_ops(wheel_site: Path, tmp_path: Path):
    for search, parent in ((None, ROOT), (ROOT, ROOT), (wheel_site, wheel_site / "mtllm_engine")):
        sources, folder = ops_and_folder(tmp_path, search=search, program=SHOW_SOURCES)
        assert sources == SOURCES and folder == parent / "csrc"


def test_what_was_measured_comes_with_the_wheel(wheel_site: Path):
    name = "kernels/attention/measured.json"
    assert (wheel_site / "mtllm_engine" / name).read_bytes() == (ROOT / name).read_bytes()


def test_our_folder_does_not_shadow_the_package_kernels():
    """With the repository root first on the path transformers must not take `kernels/` for it."""
    program = (
        "from transformers import LlamaModel; import mtllm_engine;"
        "print(LlamaModel.__name__); print('ok')"
    )
    ops, _ = ops_and_folder(ROOT, search=ROOT, program=program)
    assert ops == ["LlamaModel"]
    assert not (ROOT / "kernels" / "__init__.py").exists()
