"""What is said while something runs: live on a terminal, in whole lines in a log."""

import os
import pty
import re
import subprocess
import sys
import termios

from tests.support.machine import ROOT

PROGRAM = """
from mtllm_engine import progress
progress.LOG_S = {log_s}
with progress.Bar(total=6, desc="reading", unit="text") as bar:
    for number in range(3):
        bar.set_postfix(loss=number)
        bar.update(2)
        if number == 1:
            progress.warn("mind this")
            bar.write("step 4: measured")
print("after")
"""


def run_program(stderr: int, log_s: float = 0.0) -> None:
    command = [sys.executable, "-c", PROGRAM.format(log_s=log_s)]
    subprocess.run(command, cwd=ROOT, stdout=stderr, stderr=stderr, check=True)


def said_to_a_file(tmp_path, log_s: float) -> str:
    with (tmp_path / "log").open("wb") as file:
        run_program(file.fileno(), log_s)
    return (tmp_path / "log").read_bytes().decode()


def test_in_a_log_a_bar_is_lines(tmp_path):
    text = said_to_a_file(tmp_path, log_s=0.0)
    assert "\r" not in text and "\x1b" not in text and "\n\n" not in text and text.endswith("\n")
    bars = [line for line in text.splitlines() if line.startswith("reading: ")]
    assert all(re.fullmatch(r"reading: \d/6 \[\d\d:\d\d<.*\]", line) for line in bars)
    assert "reading: 6/6" in bars[-1] and "loss=2" in bars[-1]
    others = sorted(line for line in text.splitlines() if line not in bars)
    assert others == ["after", "mtllm: warning: mind this", "step 4: measured"]


def test_in_a_log_a_short_bar_says_nothing(tmp_path):
    text = said_to_a_file(tmp_path, log_s=60.0)
    assert sorted(text.splitlines()) == ["after", "mtllm: warning: mind this", "step 4: measured"]


def test_on_a_terminal_messages_stand_above_the_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    run_program(theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    lines = [line.split("\r")[-1].strip() for line in text.replace("\r\n", "\n").split("\n")]
    assert lines[:2] == ["mtllm: warning: mind this", "step 4: measured"]
    assert lines[2].startswith("reading: 100%") and lines[3:] == ["after", ""]
