"""Benchmarks as published, read into one form; a task family is a file of this folder that defines
`task`.

Splits are named train, validation and test everywhere, languages by our codes (FLORES-200's, or one
of that form); each reader knows what the files call them. Every example is *one* text: student and
teacher read the same characters, whatever special tokens their tokenizers would put between two.
"""

import difflib
import hashlib
import importlib
import itertools
import json
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtllm_engine.data import sources
from mtllm_engine.data.annotations import ANNOTATIONS, Annotations, Range
from mtllm_engine.data.rows import AbsentError, Row
from mtllm_engine.data.shards import Manifest
from mtllm_engine.files import write_text
from mtllm_engine.languages import is_well_formed, nearest

SPLITS = ("train", "validation", "test")
SEPARATOR = "\n"  # between the parts of a text
RECORD = "source.txt"
"""Beside a packed split: what it was made of, and the digest of that."""
CODE = re.compile(r"(?<![A-Za-z])[a-z]{3}_[A-Z][a-z]{3}(?![A-Za-z])")
KEY = re.compile(r"[A-Za-z0-9_-]+")  # in WebDataset a dot ends a key, and a slash makes a folder


@dataclass(frozen=True, kw_only=True)
class Example(Annotations):
    """One example; `Annotations` says what is pooled, answered and shortened of its `text`.

    Classification pools the whole text, so it has no spans; a choice's spans are the choices; a
    span task has one span, the passage in which the answers lie.
    """

    key: str  # unique within (dataset, split, language); letters, digits, - and _
    text: str  # what both tokenizers read


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One published set, in one or more layouts.

    `reader(folder, split, code)` yields the examples of a split in the files' order, by the
    benchmark's own code; it raises AbsentError where there is no such split or language, else
    ValueError with file, row and column.
    """

    name: str
    languages: Mapping[str, str]  # the benchmark's code (or a layout's name) -> ours
    reader: Callable[[Path, str, str], Iterator[Example]]
    licence: str

    def read(self, folder: Path | str, split: str, language: str) -> Iterator[Example]:
        """The examples of a split in one of our languages, from the set's folder as published.

        A language that `languages` does not list is looked for by our own code.

        Raises:
            AbsentError: The folder has no such split or language.
            ValueError: The language is no code of ours; or a file is malformed: the message names
                file, row and column.
        """
        if not is_well_formed(language):
            suggestion = self.languages.get(language) or nearest(language)[0]
            lack = f"{language!r} is no code of ours for a language"
            raise ValueError(f"{self.name}: {lack}; did you mean {suggestion}?")
        if split not in SPLITS:
            raise ValueError(
                f"{self.name}: unknown split {split!r}; the splits are {', '.join(SPLITS)}"
            )
        reason = AbsentError(f"{folder}: {self.name} has no {split} examples in {language}")
        listed = [code for code, ours in self.languages.items() if ours == language]
        for code in listed or [language]:
            try:
                examples = self.reader(Path(folder), split, code)
                return _distinct(self.name, itertools.chain([next(examples)], examples))
            except StopIteration:
                continue
            except AbsentError as error:
                reason = error
        raise reason

    def present(self, folder: Path | str, split: str) -> list[str]:
        """Our codes of the languages, listed or in a file's name, that a folder has examples in.

        Raises:
            ValueError: The start of a file is malformed.
        """
        named = {code for path in Path(folder).rglob("*") for code in CODE.findall(path.name)}
        candidates = sorted({*self.languages.values(), *named})
        return [code for code in candidates if self.has(folder, split, code)]

    def has(self, folder: Path | str, split: str, language: str) -> bool:
        """Whether a folder has examples of a split in one of our languages.

        Raises:
            ValueError: The start of a file is malformed.
        """
        try:
            self.read(folder, split, language)
        except AbsentError:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked of a text, and the sets that ask it."""

    name: str
    head: Literal["classification", "choice", "span"]
    labels: tuple[str, ...] = ()  # the classes' names, in order; () for choice and span
    metric: Literal["accuracy", "macro_f1", "exact_match_f1"]
    datasets: Mapping[str, Dataset]  # by name
    train: tuple[str, str]  # dataset and split of the English training set
    validation: tuple[str, str]  # dataset and split, in English: what chooses between checkpoints
    num_choices: int = 0

    @property
    def head_size(self) -> tuple[str, int]:
        """The kind of head that answers, and how many outputs it has."""
        sizes = {"classification": len(self.labels), "choice": self.num_choices, "span": 2}
        return self.head, sizes[self.head]


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
        raise ValueError(
            f"unknown task {name!r}; did you mean {nearest[0]}? There are {', '.join(names)}"
        )
    return importlib.import_module(f"{__name__}.{name}").task


def join(first: str, second: str) -> tuple[str, Range]:
    """Two sentences as one text, and the characters of the first, to be shortened where need be.

    A newline stands between them, for both tokenizers must read the same text and have no separator
    in common. Llama's tokenizer has a token for it; SentencePiece turns it into a space, so the
    encoder sees two sentences in a row, as in the documents that the stack was distilled on.
    """
    return f"{first}{SEPARATOR}{second}", (0, len(first))


def pairs(
    rows: Iterable[Row], first: str, second: str, label: str, names: Sequence[str]
) -> Iterator[Example]:
    """Classified pairs of sentences, in columns of these names; rows are numbered from 0.

    One sentence of a pair may be blank, as three premises of AmericasNLI's Nahuatl test set are
    published.
    """
    for number, row in enumerate(rows):
        sentence = row.text(first, may_be_blank=True)
        text, cut = join(sentence, row.text(second, may_be_blank=bool(sentence.strip())))
        yield Example(key=str(number), text=text, label=row.label(label, names), cut=cut)


def pack(examples: Iterable[Example], out: Path | str, *, language: str, licence: str) -> Manifest:
    """Writes examples as a corpus, in their order: a WebDataset sample each, under the example's
    key.

    Args:
        language: What the encoder is given: `EncoderLanguages.resolve` says that of a benchmark's
            language.

    Raises:
        ValueError: `out` is in use, there are no examples, two have one key, or a key is not fit
            for a file's name.
    """
    fields = {name: f"json.{name}" for name in ("text", *ANNOTATIONS)}
    distinct = _distinct(str(out), examples)
    members = (
        (example.key, {name: getattr(example, name) for name in fields}) for example in distinct
    )
    return sources.pack_json(members, out, fields=fields, language=language, licence=licence)


def pack_split(task: Task, source: str, split: str, language: str, out: Path) -> Path:
    """Packs a split of `DATASET:FOLDER` in a language, unless a corpus of its very content is
    there; returns it.

    One of what the files said before, or of what an earlier reader made of them, is packed anew.
    What lies beside its shards (stored teacher states) stays, and fits again when the files do.

    Raises:
        ValueError: The data set is none of the task's, a file is missing or malformed, or `out`
            holds another one's.
    """
    dataset, folder = find_dataset(task, source)
    record, origin = out / RECORD, f"{task.name} {source} {split} {language}"
    if not record.is_file() and (out / "manifest.json").is_file():
        return out  # without a record: whoever laid it there has made it
    other, *content = record.read_text("utf-8").split("\n") if record.is_file() else [origin]
    if other != origin:
        fix = "remove it or choose another run.dir"
        raise ValueError(f"{out} was made of {other}, not of {origin}; {fix}")
    digest = digest_of(dataset.read(folder, split, language))
    if content[:1] != [digest]:
        examples = dataset.read(folder, split, language)
        about = {"language": language, "licence": dataset.licence}
        _pack_over(out, record, (origin, digest), lambda draft: pack(examples, draft, **about))
    return out


def _pack_over(
    out: Path, record: Path, lines: tuple[str, str], pack_into: Callable[[Path], Manifest]
) -> None:
    """Packs into a folder that may hold an earlier corpus: killed at any moment, it is one or no
    corpus, and what else lies there stays."""
    if not record.is_file() and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is already there and not empty; remove it or change run.dir")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as draft:
        pack_into(Path(draft) / "corpus")
        write_text(record, f"{lines[0]}\n")  # no digest: packed anew, if this ends here
        for path in sorted(Path(draft, "corpus").iterdir()):
            path.replace(out / path.name)
    write_text(record, "\n".join(lines) + "\n")


def digest_packed(out: Path) -> str | None:
    """The `digest_of` the examples that `pack_split` made a corpus of; None: not known."""
    record = out / RECORD
    lines = record.read_text("utf-8").split("\n") if record.is_file() else []
    return lines[1] or None if len(lines) > 1 else None


def digest_now(task: Task, source: str, split: str, language: str) -> str | None:
    """The `digest_of` what a split's files say now, "" of malformed ones; None: they are gone."""
    dataset, folder = find_dataset(task, source)
    try:
        return digest_of(dataset.read(folder, split, language))
    except (OSError, AbsentError):
        return None
    except ValueError:
        return ""


def digest_of(examples: Iterable[Example]) -> str:
    """A name for the content of examples, whatever files it stands in: all that is read of them."""
    digest = hashlib.sha256()
    for example in examples:
        row = [getattr(example, name) for name in ("key", "text", *ANNOTATIONS)]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def find_dataset(task: Task, source: str) -> tuple[Dataset, Path]:
    """The data set and the folder that `DATASET:FOLDER` names.

    Raises:
        ValueError: It is none of the task's.
    """
    name, colon, folder = source.partition(":")
    if not colon or name not in task.datasets:
        known = f"data sets of {task.name} are {', '.join(task.datasets)}"
        raise ValueError(f"{source!r}: write DATASET:FOLDER; {known}")
    return task.datasets[name], Path(folder)


def _distinct(name: str, examples: Iterable[Example]) -> Iterator[Example]:
    keys: set[str] = set()
    for example in examples:
        if example.key in keys:
            raise ValueError(f"{name}: two examples have the key {example.key!r}")
        if not KEY.fullmatch(example.key):
            raise ValueError(
                f"{name}: the key {example.key!r} is not letters, digits, - and _ alone"
            )
        keys.add(example.key)
        yield example
