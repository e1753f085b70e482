"""`mtllm doctor`: each line in order or with what to do; a bug report that names nobody."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from mtllm_engine import cli, doctor
from mtllm_engine.doctor import Finding, as_json, as_text, examine


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def test_what_the_tests_run_on_can_train(findings: list[Finding]):
    named = {each.name: each for each in findings}
    assert all(each.ok for each in findings if each.is_needed)
    assert {
        "python",
        "torch",
        "deepspeed",
        "mtllm-engine",
        "gloo",
        "ports",
        "memory",
    } <= named.keys()
    assert {"/dev/shm", "open files", "disk here", "cache", "C++ compiler"} <= named.keys()
    text = as_text(findings)
    assert text.endswith("training can run here") and text.count("\n") == len(findings)


def test_kernels_are_those_of_a_runs_header(findings: list[Finding]):
    from mtllm_engine import kernels

    said = {each.name: each.value for each in findings if each.name.startswith("kernel ")}
    assert {f"kernel {name}" for name in kernels.discover()} == said.keys()
    swiglu = kernels.discover()["swiglu"]
    assert said["kernel swiglu"] == swiglu.label("cpu")


def test_a_bug_report_names_no_person_and_no_place(findings: list[Finding], monkeypatch):
    """Whatever a library puts into its error."""
    monkeypatch.setenv("SECRET_TOKEN", "hf_abcdef")
    where = f"{Path.home()}/.cache/x/lib.so of {getpass.getuser()} on {socket.gethostname()}"
    lost = Finding(name="kernel rope", value=f"no c++: {where}, /opt/a b/c.so", fix="look at ~/x/y")
    report = as_json([*findings, lost])
    for secret in (str(Path.home()), socket.gethostname(), "hf_abcdef", "/.cache", "/opt", "~/x"):
        assert secret not in report
    rows = json.loads(report)["findings"]
    assert rows[-1]["value"].startswith("no c++: lib.so of ... on ...")
    assert [row["name"] for row in rows[:-1]] == [each.name for each in findings]


@pytest.mark.parametrize(("is_needed", "status"), [(True, 1), (False, 0)])
def test_only_what_training_needs_is_a_failure(is_needed, status, monkeypatch, capsys):
    amiss = Finding(name="x", value="broken", fix="mend it", is_needed=is_needed)
    monkeypatch.setattr(doctor, "examine", lambda: [Finding(name="python", value="3"), amiss])
    assert cli.main(["doctor"]) == status
    ok, bad, last = capsys.readouterr().out.splitlines()
    assert ok.startswith("OK ") and not bad.startswith("OK ") and bad.endswith("broken; mend it")
    assert ("cannot" in last) == is_needed
    assert cli.main(["doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["findings"][1]["fix"] == "mend it"


def test_a_part_that_breaks_is_a_line(monkeypatch):
    def broken():
        raise RuntimeError("no\nlibrary")
        yield

    monkeypatch.setattr(doctor, "_devices", broken)
    named = {each.name: each for each in examine()}
    assert named["broken"].value == "RuntimeError: no library" and not named["broken"].ok
    assert "memory" in named


def test_few_files_and_little_shared_memory(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 1 << 20))
    monkeypatch.setattr(doctor, "SHARED_BYTES", 1 << 60)
    rooms = {each.name: each for each in doctor._rooms()}
    assert rooms["open files"].fix == "raise it: ulimit -n 4096" and rooms["open files"].is_needed
    assert "--shm-size" in rooms["/dev/shm"].fix and not rooms["/dev/shm"].is_needed
