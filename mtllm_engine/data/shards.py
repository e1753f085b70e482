"""Corpora: folders of WebDataset shards with a manifest, made once and then read by offset."""

import contextlib
import hashlib
import itertools
import json
import re
import textwrap
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np

from mtllm_engine.data.annotations import (
    ANNOTATIONS,
    NO_ANNOTATIONS,
    Annotations,
    parse_annotations,
)
from mtllm_engine.data.tars import (
    DamagedShardError,
    OpenShard,
    Shard,
    build_index,
    describe_shard,
    extensions_of,
    last_check,
)
from mtllm_engine.files import check_name, write_text
from mtllm_engine.progress import Bar

FORMAT = "mtllm-shards/1"
TRAIN, VALIDATION = "train", "validation"  # the folders of a corpus that was divided
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_OPEN_SHARDS = 128  # per corpus, a descriptor and a mapped index each: more than a rank has lanes


class BadDocumentError(ValueError):
    """One document without usable text, in a sound shard."""


class Sample(NamedTuple):
    """A document: its key (WebDataset's `__key__`) and its text."""

    key: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus folder holds.

    `fields["text"]` names the member with the text by its extension (`txt`), for a JSON member
    followed by the dotted path of the text in it (`json.text`, `meta.json.body.text`). Fields named
    like those of `Annotations` (`label`, `spans`, `answers`, `cut`) make each sample an example;
    they lie in the same JSON member as the text.
    """

    language: str
    licence: str
    fields: dict[str, str]
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, wherever the corpus lies."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """The manifest of a folder.

        Raises:
            ValueError: There is none, it is of another format version, ill-typed, says what cannot
                be, or was changed since it was saved.
        """
        path = Path(folder) / "manifest.json"
        again = "run `mtllm shards import` again"
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            sides = [str(path.parent / side) for side in (TRAIN, VALIDATION)]
            if all((Path(side) / path.name).is_file() for side in sides):
                raise ValueError(f"{folder} holds two corpora; name {' or '.join(sides)}") from None
            pack, import_ = "`mtllm shards pack` (from text)", "`mtllm shards import` (from tars)"
            raise ValueError(
                f"no manifest.json in {folder}; make one with {pack} or {import_}"
            ) from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not JSON; restore it or {again}") from None
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise ValueError(f"{path} has format {version!r}, not {FORMAT!r}; {again}")
        try:
            manifest = cls._parsed(content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; restore it or {again}") from None
        if content.get("fingerprint", manifest.fingerprint) != manifest.fingerprint:
            fix = "restore it or, if you changed it yourself, remove its line `fingerprint`"
            raise ValueError(f"{path} is not what was saved; {fix}")
        return manifest

    def save(self, folder: Path | str) -> None:
        content = {"format": FORMAT, "fingerprint": self.fingerprint} | asdict(self)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_text(Path(folder) / "manifest.json", text + "\n")

    @classmethod
    def _parsed(cls, content: dict[str, Any]) -> "Manifest":
        kinds = {"language": str, "licence": str, "fields": dict, "shards": list}
        table = _typed(content, kinds)
        names = ("text", *(name for name in ANNOTATIONS if name in table["fields"]))
        table["fields"] = _typed(table["fields"], dict.fromkeys(names, str))
        shards = [_typed(shard, Shard.__annotations__) for shard in table["shards"]]
        table["shards"] = tuple(Shard(**shard) for shard in shards)
        _check_shards(table["shards"])
        return cls(**table)


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """A corpus that was packed or imported, and what of the input is not in it or is doubtful."""

    path: Path
    manifest: Manifest
    left_out: dict[str, int]  # number of files that were not read, by reason
    skipped: dict[str, int]  # number of documents without usable text, by reason
    repeated: dict[str, int]  # number of samples with the key of another in their tar, by reason
    validation: Manifest | None = None  # of what was held out: the corpus `validation` beside it


def _check_shards(shards: tuple[Shard, ...]) -> None:
    """Raises ValueError where names could lead elsewhere or numbers cannot be true of any tar."""
    names = Counter(check_name(shard.name, "the name of a shard") for shard in shards)
    for shard in shards:
        if names[shard.name] > 1:
            raise ValueError(f"{names[shard.name]} shards have the name {shard.name}")
        if not 0 <= shard.samples * BLOCKSIZE <= shard.bytes < 1 << 60:
            numbers = f"{shard.samples} samples in {shard.bytes} bytes"
            raise ValueError(f"shard {shard.name} cannot hold {numbers}")


def _typed(table: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise TypeError(f"expected a table, not {table!r}")
    for name, kind in kinds.items():
        if type(table.get(name)) is not kind:
            raise TypeError(f"{name} should be of type {kind.__name__}, not {table.get(name)!r}")
    return {name: table[name] for name in kinds}


class Corpus:
    """Random access to the samples of a corpus folder; one thread reads at a time.

    A shard is checked against the manifest when it is first read; none is ever held in memory.

    Raises:
        ValueError: There is no sound manifest.
        DamagedShardError: A shard is not as empty as the manifest says.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = Manifest.load(path)
        self._layout = _parse_layout(self.manifest.fields, self.path)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._damaged: dict[int, str] = {}
        for number, shard in enumerate(self.manifest.shards):
            if not shard.samples:  # so that nobody will read it: now or never
                self._opened(number)

    def read(self, shard: int, index: int) -> Sample:
        """A sample.

        Raises:
            DamagedShardError: The whole shard is unusable, also on every later call.
            BadDocumentError: This document is.
        """
        return self.read_example(shard, index)[0]

    def read_example(self, shard: int, index: int) -> tuple[Sample, Annotations]:
        """A sample and what it says about its text: nothing, in a corpus of plain documents.

        Raises:
            DamagedShardError, BadDocumentError: As `read`.
        """
        assert index >= 0
        if shard in self._damaged:
            raise DamagedShardError(self._damaged[shard])
        try:
            return _read_sample(self._opened(shard), index, self._layout)
        except DamagedShardError as error:
            fix = "restore it, run `mtllm shards import` again, or set data.on_error=skip"
            self._damaged[shard] = f"{error}; {fix}"
            raise DamagedShardError(self._damaged[shard]) from None

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _opened(self, number: int) -> OpenShard:
        if number not in self._open:
            shard = self.manifest.shards[number]
            self._open[number] = OpenShard(
                self.path / shard.name, shard, self._layout.text.extension
            )
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


class _Field(NamedTuple):
    extension: str
    json_path: tuple[str, ...] | None  # None: the member is the text


def _parse_field(field: str) -> _Field:
    parts = field.split(".")
    if "json" not in parts:
        return _Field(field.lower(), None)  # WebDataset lowers extensions
    end = parts.index("json") + 1
    return _Field(".".join(parts[:end]).lower(), tuple(parts[end:]))


class _Layout(NamedTuple):
    text: _Field
    annotations: dict[str, tuple[str, ...]]  # path of each in the text's JSON member


def _parse_layout(fields: dict[str, str], folder: Path) -> _Layout:
    parsed = {name: _parse_field(field) for name, field in fields.items()}
    text = parsed.pop("text")
    annotations: dict[str, tuple[str, ...]] = {}
    for name, (extension, json_path) in parsed.items():
        if text.json_path is None or json_path is None or extension != text.extension:
            member = f"the same JSON member as fields.text={fields['text']!r}"
            message = f"fields.{name}={fields[name]!r} is not in {member}; write both as json.PATH"
            raise ValueError(f"{folder / 'manifest.json'}: {message}")
        annotations[name] = json_path
    return _Layout(text, annotations)


def _read_sample(shard: OpenShard, index: int, layout: _Layout) -> tuple[Sample, Annotations]:
    key, content = shard.member(index)
    try:
        if content is None:
            raise BadDocumentError(f"no member {layout.text.extension!r}")
        text = usable_text(content, layout.text.json_path)
        return Sample(key, text), _usable_annotations(content, layout.annotations, text)
    except BadDocumentError as error:
        raise BadDocumentError(f"shard {shard.path}, key {key}: {error}") from None


def usable_text(content: bytes, json_path: tuple[str, ...] | None) -> str:
    """The text of a member or line, at `json_path` if that is given.

    Raises:
        BadDocumentError: There is none; the message is the reason.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8") from None
    if json_path is not None and text.strip():
        text = _text_in_json(text, json_path)
    if not text.strip():
        raise BadDocumentError("empty")
    return text


def _usable_annotations(
    content: bytes, paths: dict[str, tuple[str, ...]], text: str
) -> Annotations:
    if not paths:
        return NO_ANNOTATIONS
    document = json.loads(content)  # the text in it was usable
    values = {name: _value_at(document, path) for name, path in paths.items()}
    try:
        annotations = parse_annotations(values)
        annotations.check(text)
    except ValueError as error:
        raise BadDocumentError(str(error)) from None
    return annotations


def _text_in_json(document: str, json_path: tuple[str, ...]) -> str:
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        raise BadDocumentError("not JSON") from None
    name = ".".join(json_path)
    value = _value_at(value, json_path)
    if not isinstance(value, str):
        raise BadDocumentError(f"field {name!r} is not text")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        # JSON can spell it, UTF-8 cannot.
        raise BadDocumentError(f"field {name!r} has half a surrogate pair")
    return value


def _value_at(value: Any, json_path: tuple[str, ...]) -> Any:
    for part in json_path:
        if not isinstance(value, dict) or part not in value:
            raise BadDocumentError(f"no field {'.'.join(json_path)!r}")
        value = value[part]
    return value


def import_shards(
    folder: Path | str,
    *,
    language: str,
    field: str = "txt",
    licence: str = "unknown",
    progress: bool = True,
) -> CorpusReport:
    """Writes the manifest of a folder of tars, in the order of their names.

    Samples that lack the member are in the manifest's numbers, as WebDataset would read them, and
    are counted: training stops at them, or skips them.

    Raises:
        ValueError: A tar does not read cleanly to its end, or no sample has the member that `field`
            names.
    """
    folder, extension = Path(folder), _parse_field(field).extension
    paths, shards = _tars(folder), []
    lacking, repeated = _Cases(), _Cases()
    for path in Bar(paths, desc="shards", unit="shard", disable=not progress):
        try:
            index = build_index(path, extension)
        except DamagedShardError as error:
            fix = "restore it, or remove it to import the others"
            raise DamagedShardError(f"{error}; {fix}") from None
        keys = index["key"]
        lacking.add(path, keys[index["offset"] < 0])
        repeated.add(path, np.delete(keys, np.unique(keys, return_index=True)[1]))
        shards.append(describe_shard(path, len(index)))
    if lacking.count == sum(shard.samples for shard in shards):
        fix = f"name another with --field: {', '.join(extensions_of(paths[0]))}"
        raise ValueError(f"no member {extension!r} in {folder}; {fix}")
    manifest = Manifest(
        language=language, licence=licence, fields={"text": field}, shards=tuple(shards)
    )
    manifest.save(folder)
    apart = "members of one sample that do not follow one another are two samples: sort the tar"
    return CorpusReport(
        path=folder,
        manifest=manifest,
        left_out=_beside(folder, paths),
        skipped=lacking.by_reason(f"no member {extension!r}"),
        repeated=repeated.by_reason("a key of another sample", apart),
    )


@dataclass
class _Cases:
    """How many samples something is true of, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, path: Path, keys: np.ndarray) -> None:
        if len(keys) and not self.count:
            self.first = f"{keys[0].decode('utf-8', 'replace')} in {path.name}"
        self.count += len(keys)

    def by_reason(self, reason: str, fix: str = "") -> dict[str, int]:
        text = f"{reason}, such as {self.first}" + (f"; {fix}" if fix else "")
        return {text: self.count} if self.count else {}


def _tars(folder: Path) -> list[Path]:
    for path in folder.glob("[!.]*"):
        if re.search(r"\.(tgz|tar\.\w+)$", path.name):
            raise ValueError(f"{path} is compressed and cannot be read by offset; decompress it")
    if not (paths := sorted(folder.glob("[!.]*.tar"))):
        raise ValueError(f"no .tar files in {folder}")
    for path in paths:
        check_name(path.name, f"a shard in {folder}")
    return paths


def _beside(folder: Path, paths: list[Path]) -> dict[str, int]:
    """What is in a folder besides tars and manifest, and tars below it, where nobody looks."""
    others = {path for path in folder.glob("[!.]*") if path.is_file()} - {*paths}
    counts = Counter(kind_of(path) for path in others - {folder / "manifest.json"})
    counts.update({".tar in a folder below": len(list(folder.glob("[!.]*/**/*.tar")))})
    return dict(+counts)


def kind_of(path: Path) -> str:
    """The ending of a file's name, with the one before it where that says what is packed in it."""
    last = path.suffix.lower()
    packed = Path(path.stem).suffix.lower() if last in _PACKED else ""
    return f"{packed}{last}" or "no ending"


def verify(folder: Path | str, progress: bool = True) -> list[str]:
    """Every problem of a corpus, one line each: damage, bad documents, tars not in the manifest."""
    folder, manifest = Path(folder), Manifest.load(folder)
    listed = {shard.name for shard in manifest.shards}
    unlisted = {path.name for path in folder.glob("*.tar")} - listed
    problems = [f"shard {folder / name} is not in the manifest" for name in sorted(unlisted)]
    layout = _parse_layout(manifest.fields, folder)
    for shard in Bar(manifest.shards, desc="shards", unit="shard", disable=not progress):
        try:
            problems += _bad_documents(folder / shard.name, shard, layout)
        except DamagedShardError as error:
            problems.append(str(error))
    return problems


def _bad_documents(path: Path, shard: Shard, layout: _Layout) -> list[str]:
    problems = []
    opened = OpenShard(path, shard, layout.text.extension, checks_anew=True)
    with contextlib.closing(opened):
        for index in range(shard.samples):
            try:
                _read_sample(opened, index, layout)
            except BadDocumentError as error:
                problems.append(str(error))
    return problems


def show(folder: Path | str, samples: int = 3) -> str:
    """A table of what a corpus holds, and its first texts, shortened."""
    with contextlib.closing(Corpus(folder)) as corpus:
        manifest = corpus.manifest
        names = ("language", "licence", "samples", "fingerprint")
        rows = [(name, str(getattr(manifest, name))) for name in names]
        rows += [*manifest.fields.items(), ("shards", str(len(manifest.shards)))]
        for shard in manifest.shards[:10]:
            size = f"{shard.samples} samples, {shard.bytes} bytes"
            rows.append((shard.name, f"{size}, {_checked(corpus.path / shard.name, shard)}"))
        indices = (
            (number, index)
            for number, shard in enumerate(manifest.shards)
            for index in range(shard.samples)
        )
        rows += [_shown(corpus, *pair) for pair in itertools.islice(indices, samples)]
    return "\n".join(f"{name:<12}  {value}" for name, value in rows)


def _checked(path: Path, shard: Shard) -> str:
    at = last_check(path, shard)
    if at is None:
        return "not checked on this machine"
    return f"found sound {datetime.fromtimestamp(at):%Y-%m-%d %H:%M}"


def _shown(corpus: Corpus, shard: int, index: int) -> tuple[str, str]:
    try:
        key, text = corpus.read(shard, index)
    except BadDocumentError as error:
        return "bad", str(error)
    return key, textwrap.shorten(text, 100, placeholder=" ...")
