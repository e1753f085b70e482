"""Benchmarks as published, read into one form; a task family is a file of this folder that defines `task`.

Splits are named train, validation and test everywhere, languages by our codes (FLORES-200's, or one of that form);
each reader knows what the files call them. Every example is *one* text: student and teacher read the same characters,
whatever special tokens their tokenizers would put between two.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtllm_engine.data.marks import Marks, Range

SPLITS = ("train", "validation", "test")
SEPARATOR = "\n"  # between the parts of a text


@dataclass(frozen=True, kw_only=True)
class Example(Marks):
    """One example. `Marks` says what is pooled, answered and shortened: characters [start, end) of `text`.

    Classification pools the whole text, so it has no spans; a choice's spans are the choices; a span task has one span,
    the passage in which the answers lie.
    """

    key: str  # unique within (dataset, split, language); letters, digits, - and _
    text: str  # what both tokenizers read


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One published set, in one or more layouts.

    `read(folder, split, language)` yields the examples of a split in the files' order; `folder` is the set's root as
    published. It raises Absent where there is no such split or language, else ValueError with file, line and column.
    """

    name: str
    languages: Mapping[str, str]  # the benchmark's code (or a name of a layout) -> ours
    read: Callable[[Path, str, str], Iterator[Example]]
    licence: str


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    head: Literal["classification", "choice", "span"]
    labels: tuple[str, ...]  # the classes' names, in order; () for choice and span
    metric: Literal["accuracy", "macro_f1", "exact_match_f1"]
    datasets: Mapping[str, Dataset]  # by name
    train: tuple[str, str]  # dataset and split of the English training set
    validation: tuple[str, str]  # dataset and split, in English: what chooses between checkpoints
    num_choices: int = 0


def task_names() -> list[str]:
    """The task families there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_task(name: str) -> Task:
    """The task family of a name.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    names = task_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0) or names
        raise ValueError(f"unknown task {name!r}; did you mean {nearest[0]}? There are {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}").task


def join(first: str, second: str) -> tuple[str, Range]:
    """Two sentences as one text, and the characters of the first: what is shortened where both are too long.

    A newline stands between them, for both tokenizers must read the same text and have no separator in common. Llama's
    tokenizer has a token for it; SentencePiece turns it into a space, so the encoder sees two sentences in a row, as in
    the documents that the stack was distilled on.
    """
    return f"{first}{SEPARATOR}{second}", (0, len(first))
