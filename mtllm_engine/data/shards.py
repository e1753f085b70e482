"""Corpora: folders of WebDataset shards with a manifest, made once and then read by offset.

Plain WebDataset loses the rest of a shard that is damaged at a header, without an error; the manifest's counts and
hashes are what makes that detectable.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from mtllm_engine.data import marks
from mtllm_engine.data.marks import Marks

FORMAT = "mtllm-shards/1"
_OPEN_SHARDS = 128  # per corpus, one descriptor and one mapped index each: more than a rank has lanes
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # member names that WebDataset passes over
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedShard(ValueError):
    """A shard that is not what its manifest says, or that does not read to its end."""


class BadDocument(ValueError):
    """One document without usable text, in a sound shard."""


class Sample(NamedTuple):
    key: str  # WebDataset's __key__
    text: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus folder holds.

    `fields["text"]` names the member with the text by its extension (`txt`), for a JSON member followed by the dotted
    path of the text in it (`json.text`, `meta.json.body.text`). Fields named like those of `Marks` (`label`, `spans`,
    `answers`, `cut`) make each sample an example; they lie in the same JSON member as the text.
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
        """Raises ValueError: there is no manifest, it is of another format version, or ill-typed."""
        path = Path(folder) / "manifest.json"
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            fix = "make one with `mtllm shards pack` (from text) or `mtllm shards import` (from tars)"
            raise ValueError(f"no manifest.json in {folder}; {fix}") from None
        except ValueError:
            raise ValueError(f"{path} is not JSON; restore it or run `mtllm shards import` again") from None
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise ValueError(f"{path} has format {version!r}, not {FORMAT!r}; run `mtllm shards import` again")
        try:
            kinds = {"language": str, "licence": str, "fields": dict, "shards": list}
            parsed = _typed(content, kinds)
            names = ("text", *(name for name in marks.NAMES if name in parsed["fields"]))
            parsed["fields"] = _typed(parsed["fields"], dict.fromkeys(names, str))
            shards = tuple(Shard(**_typed(shard, Shard.__annotations__)) for shard in parsed.pop("shards"))
        except TypeError as error:
            raise ValueError(f"{path}: {error}; restore it or run `mtllm shards import` again") from None
        return cls(**parsed, shards=shards)

    def save(self, folder: Path | str) -> None:
        content = json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False)
        with _atomic(Path(folder) / "manifest.json") as file:
            file.write(content.encode() + b"\n")


def _typed(table: Any, kinds: dict[str, type]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise TypeError(f"expected a table, not {table!r}")
    for name, kind in kinds.items():
        if type(table.get(name)) is not kind:
            raise TypeError(f"{name} should be of type {kind.__name__}, not {table.get(name)!r}")
    return {name: table[name] for name in kinds}


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` complete and on disk, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class Corpus:
    """Random access to the samples of a corpus folder; one thread reads at a time.

    A shard is checked against the manifest when it is first read, once per node: what the check finds (where each
    text lies) is kept in a cache that the ranks share. No shard is ever held in memory.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = Manifest.load(path)
        self._layout = _parse_layout(self.manifest.fields, self.path)
        self._open: OrderedDict[int, tuple[BinaryIO, np.ndarray]] = OrderedDict()
        self._damaged: dict[int, str] = {}

    def read(self, shard: int, index: int) -> Sample:
        """Raises DamagedShard (the whole shard is unusable, also on every later call) or BadDocument."""
        return self.read_example(shard, index)[0]

    def read_example(self, shard: int, index: int) -> tuple[Sample, Marks]:
        """A sample and what it says about its text: nothing, in a corpus of plain documents. Raises as `read`."""
        assert index >= 0
        path = self.path / self.manifest.shards[shard].name
        if shard in self._damaged:
            raise DamagedShard(self._damaged[shard])
        try:
            file, table = self._opened(shard, path)
            return _read_sample(file, path, table[index], self._layout)
        except DamagedShard as error:
            fix = "restore it, run `mtllm shards import` again, or set data.on_error=skip"
            self._damaged[shard] = f"{error}; {fix}"
            raise DamagedShard(self._damaged[shard]) from None

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()

    def _opened(self, shard: int, path: Path) -> tuple[BinaryIO, np.ndarray]:
        if shard not in self._open:
            table = _load_index(path, self.manifest.shards[shard], self._layout.text.extension)
            with _damage_named(path):
                self._open[shard] = path.open("rb", buffering=0), table
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(shard)
        return self._open[shard]


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
    marks: dict[str, tuple[str, ...]]  # path of each in the text's JSON member


def _parse_layout(fields: dict[str, str], folder: Path) -> _Layout:
    parsed = {name: _parse_field(field) for name, field in fields.items()}
    text = parsed.pop("text")
    for name, (extension, json_path) in parsed.items():
        if text.json_path is None or json_path is None or extension != text.extension:
            told = f"fields.{name}={fields[name]!r} is not in the same JSON member as fields.text={fields['text']!r}"
            raise ValueError(f"{folder / 'manifest.json'}: {told}; write both as json.PATH")
    return _Layout(text, {name: field.json_path for name, field in parsed.items()})


def _read_sample(file: BinaryIO, path: Path, row: np.void, layout: _Layout) -> tuple[Sample, Marks]:
    raw_key, offset, size = row.item()
    key = raw_key.decode("utf-8", "surrogateescape")
    try:
        if offset < 0:
            raise BadDocument(f"no member {layout.text.extension!r}")
        with _damage_named(path):
            raw = os.pread(file.fileno(), size, offset)
        if len(raw) < size:
            raise DamagedShard(f"shard {path} was cut while it was read")
        text = usable_text(raw, layout.text.json_path)
        return Sample(key, text), _usable_marks(raw, layout.marks, text) if layout.marks else marks.NONE
    except BadDocument as error:
        raise BadDocument(f"shard {path}, key {key}: {error}") from None


def usable_text(raw: bytes, json_path: tuple[str, ...] | None) -> str:
    """The text of a member or line, at `json_path` if that is given; raises BadDocument with the reason."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadDocument("not UTF-8") from None
    if json_path is not None and text.strip():
        text = _text_in_json(text, json_path)
    if not text.strip():
        raise BadDocument("empty")
    return text


def _usable_marks(raw: bytes, paths: dict[str, tuple[str, ...]], text: str) -> Marks:
    document = json.loads(raw)  # the text in it was usable
    try:
        found = marks.parse_marks({name: _value_at(document, path) for name, path in paths.items()})
        found.check(text)
    except ValueError as error:
        raise BadDocument(str(error)) from None
    return found


def _text_in_json(document: str, json_path: tuple[str, ...]) -> str:
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        raise BadDocument("not JSON") from None
    name = ".".join(json_path)
    value = _value_at(value, json_path)
    if not isinstance(value, str):
        raise BadDocument(f"field {name!r} is not text")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadDocument(f"field {name!r} has half a surrogate pair")  # JSON can spell it, UTF-8 cannot
    return value


def _value_at(value: Any, json_path: tuple[str, ...]) -> Any:
    for part in json_path:
        if not isinstance(value, dict) or part not in value:
            raise BadDocument(f"no field {'.'.join(json_path)!r}")
        value = value[part]
    return value


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedShard(f"shard {path} is missing") from None
    except OSError as error:
        raise DamagedShard(f"shard {path} cannot be read: {error.strerror or error}") from None


def _load_index(path: Path, shard: Shard, extension: str) -> np.ndarray:
    """The index of a sound shard, memory-mapped; of all ranks on a node one makes it and the others wait."""
    with _damage_named(path):
        state = path.stat()
    identity = [asdict(shard), extension, str(path.absolute()), state.st_size, state.st_mtime_ns]
    cached = _cache_folder() / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.npy"
    if (table := _mapped(cached)) is not None:
        return table
    try:
        with cached.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (table := _mapped(cached)) is None:
                table = _checked_index(path, shard, extension)
                with _atomic(cached) as file:
                    np.save(file, table)
                table = np.load(cached, mmap_mode="r")
    except OSError as error:
        fix = "free some space or set XDG_CACHE_HOME"
        raise ValueError(f"cannot write the shard index in {cached.parent}: {error.strerror}; {fix}") from None
    return table


def _mapped(cached: Path) -> np.ndarray | None:
    try:
        return np.load(cached, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there yet, or spoilt: made again
        return None


def _cache_folder() -> Path:
    """The first folder that can be written and locked (a home on a network disk may refuse either)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "mtllm", Path(tempfile.gettempdir()) / f"mtllm-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
            return folder
        except OSError:
            continue
    raise ValueError("no folder for the shard index can be written; set XDG_CACHE_HOME")


def _checked_index(path: Path, shard: Shard, extension: str) -> np.ndarray:
    with _damage_named(path):
        size = path.stat().st_size
        if size < shard.bytes:
            raise DamagedShard(f"shard {path} is cut: {size} of {shard.bytes} bytes")
        if size > shard.bytes:
            raise DamagedShard(f"shard {path} is too long: {size} bytes, its manifest says {shard.bytes}")
        if sha256_of(path) != shard.sha256:
            raise DamagedShard(f"shard {path} does not match its sha256")
        table = _build_index(path, extension)
        if len(table) != shard.samples:
            raise DamagedShard(f"shard {path} holds {len(table)} samples, its manifest says {shard.samples}")
        return table


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build_index(path: Path, extension: str) -> np.ndarray:
    """One row per sample: key, and offset and size of its member `extension` (-1 if it has none)."""
    rows = []
    with path.open("rb") as file:
        for sample in _samples(file, path):
            offset, size = sample.get(extension, (-1, -1))
            rows.append((sample["__key__"].encode("utf-8", "surrogateescape"), offset, size))
    width = max([1, *(len(key) for key, _, _ in rows)])
    return np.array(rows, dtype=[("key", f"S{width}"), ("offset", "<i8"), ("size", "<i8")])


def _samples(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    """WebDataset's samples, by WebDataset's own grouping, with (offset, size) of each member in place of its bytes."""
    from webdataset.tariterators import group_by_keys  # imports torch

    try:
        members = _members(file, path)
        yield from group_by_keys({"fname": name, "data": place, "__url__": ""} for name, place in members)
    except DamagedShard:
        raise
    except (tarfile.TarError, ValueError) as error:  # two members of one name are a ValueError
        raise DamagedShard(f"shard {path} is not a sound tar: {error.args[0]}") from None


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (offset, size) of each member that WebDataset would read, up to a sound end of the archive."""
    magic = file.read(8)
    for prefix, kind in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise DamagedShard(f"shard {path} is compressed ({kind}) and cannot be read by offset; decompress it")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all
            if member.issparse():
                raise DamagedShard(f"shard {path} has a sparse member, {member.name}; write it with another tar")
            if member.isreg() and not _SKIPPED.match(member.name):
                yield member.name, (member.offset_data, member.size)
        _check_end(file, path, tar.offset)


def _check_end(file: BinaryIO, path: Path, end: int) -> None:
    """Raises unless the archive ends properly: one cut between two members looks whole to tarfile."""
    file.seek(end)
    blocks = file.read(2 * tarfile.BLOCKSIZE)
    if len(blocks) < 2 * tarfile.BLOCKSIZE:
        raise DamagedShard(f"shard {path} is cut: no end of the archive at byte {end}")
    if any(blocks):
        raise DamagedShard(f"shard {path} is damaged at byte {end}: no valid header there")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DamagedShard(
                f"shard {path} goes on after its end of the archive at byte {end}; WebDataset stops there"
            )


def import_shards(
    folder: Path | str, *, language: str, field: str = "txt", licence: str = "unknown", progress: bool = True
) -> Manifest:
    """Writes the manifest of a folder of tars, in the order of their names.

    Raises:
        ValueError: a tar does not read cleanly to its end, or no sample has the member that `field` names.
    """
    folder, extension = Path(folder), _parse_field(field).extension
    paths = _tars(folder)
    shards, num_texts = [], 0
    for path in tqdm(paths, unit="shard", disable=None if progress else True):
        try:
            table = _build_index(path, extension)
        except DamagedShard as error:
            raise DamagedShard(f"{error}; restore it, or remove it to import the others") from None
        num_texts += np.count_nonzero(table["offset"] >= 0)
        shards.append(Shard(name=path.name, samples=len(table), bytes=path.stat().st_size, sha256=sha256_of(path)))
    if not num_texts:
        raise ValueError(f"no member {extension!r} in {folder}; name another with --field: {_extensions(paths[0])}")
    manifest = Manifest(language=language, licence=licence, fields={"text": field}, shards=tuple(shards))
    manifest.save(folder)
    return manifest


def _tars(folder: Path) -> list[Path]:
    for path in folder.glob("*"):
        if re.search(r"\.(tgz|tar\.\w+)$", path.name):
            raise ValueError(f"{path} is compressed and cannot be read by offset; decompress it")
    if not (paths := sorted(folder.glob("*.tar"))):
        raise ValueError(f"no .tar files in {folder}")
    return paths


def _extensions(path: Path) -> str:
    with path.open("rb") as file:
        return ", ".join(name for name in next(_samples(file, path), {}) if not name.startswith("__"))


def verify(folder: Path | str, progress: bool = True) -> list[str]:
    """Every problem of a corpus, one line each: damaged shards, bad documents, tars that the manifest lacks."""
    folder, manifest = Path(folder), Manifest.load(folder)
    unlisted = {path.name for path in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}
    problems = [f"shard {folder / name} is not in the manifest" for name in sorted(unlisted)]
    for shard in tqdm(manifest.shards, unit="shard", disable=None if progress else True):
        try:
            problems += _bad_documents(folder / shard.name, shard, _parse_layout(manifest.fields, folder))
        except DamagedShard as error:
            problems.append(str(error))
    return problems


def _bad_documents(path: Path, shard: Shard, layout: _Layout) -> list[str]:
    table, problems = _checked_index(path, shard, layout.text.extension), []
    with path.open("rb", buffering=0) as file:
        for row in table:
            try:
                _read_sample(file, path, row, layout)
            except BadDocument as error:
                problems.append(str(error))
    return problems


def show(folder: Path | str, samples: int = 3) -> str:
    """A table of what a corpus holds, and its first texts, shortened."""
    with contextlib.closing(Corpus(folder)) as corpus:
        manifest = corpus.manifest
        rows = [(name, getattr(manifest, name)) for name in ("language", "licence", "samples", "fingerprint")]
        rows += [*manifest.fields.items(), ("shards", len(manifest.shards))]
        rows += [(shard.name, f"{shard.samples} samples, {shard.bytes} bytes") for shard in manifest.shards[:10]]
        places = ((number, row) for number, shard in enumerate(manifest.shards) for row in range(shard.samples))
        rows += [_shown(corpus, *place) for place in itertools.islice(places, samples)]
    return "\n".join(f"{name:<12}  {value}" for name, value in rows)


def _shown(corpus: Corpus, shard: int, index: int) -> tuple[str, str]:
    try:
        key, text = corpus.read(shard, index)
    except BadDocument as error:
        return "bad", str(error)
    return key, textwrap.shorten(text, 100, placeholder=" ...")
