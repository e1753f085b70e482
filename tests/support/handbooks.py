"""The README and the handbooks, as a program reads them: blocks, links, headings, commands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.machine import ROOT

HANDBOOKS = (  # in the order in which their commands build on one another
    "README.md",
    "mtllm_engine/babel/README.md",
    "configs/README.md",
    "mtllm_engine/data/README.md",
    "mtllm_engine/model/README.md",
    "mtllm_engine/tasks/README.md",
    "mtllm_engine/training/README.md",
    "mtllm_engine/evaluation/README.md",
    "mtllm_engine/export/README.md",
    "mtllm_engine/README.md",
    "kernels/README.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
    "tests/README.md",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    handbook: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.handbook}:{self.line}"


def read(handbook: str) -> str:
    return (ROOT / handbook).read_text("utf-8")


def blocks(handbook: str) -> Iterator[Block]:
    """In their order."""
    text = read(handbook)
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(handbook, line, match[1], match[2])


def prose(handbook: str) -> str:
    """What stands outside of the blocks."""
    return FENCE.sub("", read(handbook))


def links(handbook: str) -> list[str]:
    return LINK.findall(prose(handbook))


def anchors(handbook: str) -> set[str]:
    """What a link behind `#` may name: the headings, as GitHub spells them."""
    titles = re.findall(r"^#+ (.*)$", prose(handbook), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def path_of(handbook: str, link: str) -> Path:
    """The file or folder that a relative link means."""
    return (ROOT / handbook).parent / link.partition("#")[0]
