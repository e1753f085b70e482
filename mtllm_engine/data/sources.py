"""Documents from text, JSONL and Parquet files: one by one, or written as a corpus of about equal
shards.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from mtllm_engine.data.shards import (
    TRAIN,
    VALIDATION,
    BadDocumentError,
    CorpusReport,
    Manifest,
    kind_of,
    usable_text,
)
from mtllm_engine.data.tars import Shard, describe_shard
from mtllm_engine.files import atomic_folder, sync, sync_folder
from mtllm_engine.progress import Bar

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_LINE_SUFFIXES = (".txt", *_JSON_SUFFIXES)
INPUT_SUFFIXES = (*_LINE_SUFFIXES, *(f"{suffix}.gz" for suffix in _LINE_SUFFIXES), ".parquet")
_ENDINGS = ", ".join(INPUT_SUFFIXES)
_SMALL_INPUT_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
STANDARD_INPUT = "-"
_HEAD_BYTES = 1 << 20  # more than a JSON value needs to show that it goes on over lines


def pack(
    inputs: Iterable[Path | str],
    out: Path | str,
    *,
    field: str = "text",
    language: str,
    shards: int,
    licence: str = "unknown",
    on_error: Literal["raise", "skip"] = "raise",
    held_out: float | None = None,
    progress: bool = True,
) -> CorpusReport:
    """Makes a corpus of about equal shards from text, JSONL and Parquet, in the order of the input.

    With `held_out` it makes two: `out/train`, and `out/validation` of one shard. A hash of each
    text says into which it goes, so equal texts are never on both sides.

    Args:
        inputs: Files, or folders searched for files of the known kinds: linked folders too, once
            each, hidden ones not. Read once.
        field: Column of a Parquet file, or dotted path in a JSON line.
        on_error: What to do with a document without usable text.
        held_out: The share of the texts that is for validation, above 0 and below 1.

    Raises:
        ValueError: `out` is in use, an input is of no known kind or JSON that is not JSON Lines, a
            document is bad, or there are too few of them, also for one side alone.
        OSError: A file could not be read or written. After any error nothing is left behind.
    """
    out, (paths, left_out) = Path(out), _input_files(inputs)
    if shards < 1:
        raise ValueError(f"cannot make {shards} shards; use --shards 1 or more")
    if held_out is not None and not 0 < held_out < 1:
        raise ValueError(f"--held-out {held_out} is not above 0 and below 1; try 0.01")
    _check_unused(out)
    for path in paths:
        if _kind(path) in _JSON_SUFFIXES:
            _check_json_lines(path)
    num_bytes = sum(path.stat().st_size for path in paths)
    skipped: Counter[str] = Counter()
    bar = Bar(total=num_bytes, desc="packing", unit="B", unit_scale=True, disable=not progress)
    with bar, _all_or_nothing(out) as draft:
        texts = _texts(paths, field, skipped if on_error == "skip" else None, bar)
        if held_out is None:
            sides = {"": _write_shards(draft, _assign(texts, num_bytes, shards))}
        else:
            sides = _write_sides(draft, texts, held_out, num_bytes, shards)
        corpus = partial(Manifest, language=language, licence=licence, fields={"text": "txt"})
        manifests = {side: corpus(shards=tuple(packed)) for side, packed in sides.items()}
        for side, manifest in manifests.items():
            manifest.save(draft / side)
            sync_folder(draft / side)
    side = next(iter(sides))
    return CorpusReport(
        path=out / side,
        manifest=manifests[side],
        validation=manifests.get(VALIDATION),
        left_out=dict(left_out),
        skipped=dict(skipped),
        repeated={},
    )


def pack_json(
    members: Iterable[tuple[str, Mapping[str, Any]]],
    out: Path | str,
    *,
    fields: dict[str, str],
    language: str,
    licence: str = "unknown",
) -> Manifest:
    """Makes a corpus of one shard from (key, object) pairs: a `.json` member each.

    Args:
        members: The keys are distinct, without dots and slashes.
        fields: The manifest's, such as {"text": "json.text"}.

    Raises:
        ValueError: `out` is in use, or there is nothing to write.
        OSError: A file could not be written. After any error nothing is left behind.
    """
    out = Path(out)
    _check_unused(out)
    samples = (
        (key, "json", json.dumps(value, ensure_ascii=False).encode()) for key, value in members
    )
    with _all_or_nothing(out) as draft:
        shard = _write_shard(draft / "000000.tar", samples)
        if not shard.samples:
            raise ValueError(f"there is nothing to write into {out}")
        manifest = Manifest(language=language, licence=licence, fields=fields, shards=(shard,))
        manifest.save(draft)
    return manifest


def read_texts(source: str, field: str = "text") -> Iterator[str]:
    """The texts of one file, or of standard input, a line each: every document's, in their order,
    so that what is made of each stands in a row of its number.

    Args:
        field: As for `pack`.

    Raises:
        ValueError: There is no such file, it is of no known kind, or a document has no usable text.
    """
    path = Path(source)
    if source == STANDARD_INPUT:
        lines = enumerate(sys.stdin.buffer)
        documents: Iterator[tuple[bytes, float]] = ((_content(*line), 0.0) for line in lines)
        json_path = None
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; name one file that ends in {_ENDINGS}")
    else:
        _input_files([path])
        if _kind(path) in _JSON_SUFFIXES:
            _check_json_lines(path)
        documents, json_path = _documents(path, field)
    for number, (raw, _) in enumerate(documents, start=1):
        try:
            yield usable_text(raw, json_path)
        except BadDocumentError as error:
            fix = "mend it or take it out"
            raise BadDocumentError(f"{source}:{number}: {error}; {fix}") from None


def _check_unused(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there and not empty; remove it or name another --out")
    if out.resolve() == Path.cwd():  # it would be replaced, under the feet of who stands in it
        raise ValueError(f"{out} is the current folder; name one in it with --out")


def _input_files(inputs: Iterable[Path | str]) -> tuple[list[Path], Counter[str]]:
    """The files that are read, and how many others the folders have, by what they are."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in map(Path, inputs):
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        candidates = sorted(_files_below(path)) if path.is_dir() else [path]
        known = [file for file in candidates if _is_known(file)]
        others = Counter(_reason(file) for file in candidates if not _is_known(file))
        if not known:
            has = ", ".join(f"{count} {reason}" for reason, count in sorted(others.items()))
            raise ValueError(
                f"{path}: neither a file nor a folder with files that end in {_ENDINGS}"
                + (f"; it has {has}" if has and path.is_dir() else "")
            )
        files += known
        left_out += others
    return files, left_out


def _files_below(folder: Path) -> Iterator[Path]:
    """What is not hidden in a folder and those below it: in linked ones too, but in each once."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    folders = [str(folder)]
    while folders:  # linked ones later, so that a file has its own path where it has one
        linked: list[str] = []
        for start in folders:
            for root, below, names in os.walk(start, onerror=fail):
                is_new = (real := os.path.realpath(root)) not in seen
                seen.add(real)
                below[:] = sorted(name for name in below if is_new and not name.startswith("."))
                linked += [path for name in below if os.path.islink(path := f"{root}/{name}")]
                if is_new:
                    yield from (Path(root, name) for name in names if not name.startswith("."))
        folders = linked


def _is_known(file: Path) -> bool:
    return file.name.lower().endswith(INPUT_SUFFIXES) and file.is_file()


def _reason(file: Path) -> str:
    if not file.exists():
        return "a link to nothing"
    return kind_of(file) if file.is_file() else "not a regular file"


def _kind(path: Path) -> str:
    """The ending of an input's name, without that of its compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """`atomic_folder`, with an error of the system in one line that says so."""
    try:
        with atomic_folder(out) as draft:
            yield draft
    except OSError as error:
        reason = error.strerror or str(error)
        reason += f": {error.filename}" if error.filename else ""
        raise OSError(f"packing into {out} failed: {reason}; nothing was written") from error


def _texts(
    paths: list[Path], field: str, skipped: Counter[str] | None, bar: Bar
) -> Iterator[tuple[str, float]]:
    """Each text with how many bytes of the input lie before it.

    Args:
        skipped: Counts bad documents by reason; None: the first one raises.
    """
    start = 0
    for path in paths:
        documents, json_path = _documents(path, field)
        for number, (raw, before) in enumerate(documents, start=1):
            bar.update(start + before - bar.n)
            try:
                yield usable_text(raw, json_path), start + before
            except BadDocumentError as error:
                if skipped is None:
                    fix = "mend it or use --on-error skip"
                    raise BadDocumentError(f"{path}:{number}: {error}; {fix}") from None
                skipped[str(error)] += 1
        start += path.stat().st_size
    bar.update(start - bar.n)


def _documents(
    path: Path, field: str
) -> tuple[Iterator[tuple[bytes, float]], tuple[str, ...] | None]:
    """Each document with the bytes of the file before it, and where in one its text is, if it is
    JSON."""
    if _kind(path) == ".parquet":
        return _parquet_column(path, field), None
    return _lines(path), tuple(field.split(".")) if _kind(path) in _JSON_SUFFIXES else None


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """An open file, and its content: of a .gz what is compressed in it."""
    with (
        path.open("rb") as raw,
        gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw as file,
    ):
        try:
            yield raw, cast(BinaryIO, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is cut or damaged: {error}") from None


def _check_json_lines(path: Path) -> None:
    """Raises ValueError where the first JSON value is an array of documents, or goes on over lines:
    of such a file, lines that happen to be whole would be taken for all there is.
    """
    with _unpacked(path) as (_, file):
        raw = file.read(_HEAD_BYTES)
    head = raw.removeprefix(_BOM).decode("utf-8", "replace").strip()
    is_whole = len(raw) < _HEAD_BYTES
    try:
        _, reached = json.JSONDecoder().raw_decode(head)
    except json.JSONDecodeError as error:
        reached = error.pos
    except RecursionError:
        return
    line, _, more = head.partition("\n")
    # A bad line breaks off at the next one's first character, if not before; a value goes on.
    goes_on = bool(more) and reached > len(head) - len(more.lstrip())
    is_array = head.startswith("[")
    is_alone = is_array and not more and (reached == len(line) or not is_whole)
    if goes_on or is_alone:
        value = "a JSON array" if is_array else "a JSON object over several lines"
        fix = f"jq -c {'.[]' if is_array else '.'} {path.name} > other.jsonl"
        raise ValueError(f"{path} is {value}; JSON Lines are wanted, an object a line: {fix}")


def _lines(path: Path) -> Iterator[tuple[bytes, float]]:
    """Each line with how many bytes of the file lie before it: compressed bytes, of a .gz."""
    num_bytes = path.stat().st_size
    with _unpacked(path) as (raw, file):
        # A short .gz is unpacked in very few reads, too coarse to cut it by; its true length
        # costs little.
        is_small = num_bytes < _SMALL_INPUT_BYTES
        scale = num_bytes / max(1, file.seek(0, os.SEEK_END)) if is_small else None
        file.seek(0)
        before = 0.0
        for number, line in enumerate(file):
            yield _content(number, line), before
            before = raw.tell() if scale is None else file.tell() * scale


def _content(number: int, line: bytes) -> bytes:
    """A line without its end, the first one without the mark that some programs put there."""
    content = line.removesuffix(b"\n").removesuffix(b"\r")
    return content if number else content.removeprefix(_BOM)


def _parquet_column(path: Path, field: str) -> Iterator[tuple[bytes, float]]:
    """Each text of a column with its share of the file's bytes before it; null is an empty text."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    num_bytes, seen = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column, *below = _column_path(path, field, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                texts = batch.column(column)
                for name in below:
                    texts = pyarrow.compute.struct_field(texts, name)
                texts = texts.cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                for raw in texts.to_pylist():
                    yield raw or b"", num_bytes * seen / file.metadata.num_rows
                    seen += 1
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a sound Parquet file: {reason}") from None


def _column_path(path: Path, field: str, schema: Any) -> list[str]:
    """The column whose name is `field`, or the one and the struct's fields that its dots name."""
    import pyarrow.types as kinds

    names = [field] if field in schema.names else field.split(".")
    if schema.names.count(names[0]) != 1:
        fix = f"name one with --field: {', '.join(schema.names)}"
        has = f"{schema.names.count(names[0])} columns" if names[0] in schema.names else "no column"
        raise ValueError(f"{path} has {has} {names[0]!r}; {fix}")
    kind = schema.field(names[0]).type
    for name in names[1:]:
        if not kinds.is_struct(kind) or kind.get_field_index(name) < 0:
            raise ValueError(f"{path} has no column {field!r}: {name!r} is not in {kind}")
        kind = kind.field(name).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        fix = "name another with --field"
        raise ValueError(f"{path}: column {field!r} holds {kind}, not text; {fix}")
    return names


def _assign(
    texts: Iterator[tuple[str, float]], num_bytes: int, shards: int
) -> Iterator[tuple[int, str]]:
    """Each text with its shard: the one that the bytes before it say, but no shard is left out.

    A long document may have the bytes of several shards, so the number grows by one at most; and it
    grows when as many documents as shards are left. Seeing `shards` documents ahead is enough to
    know when.
    """
    ahead = deque(itertools.islice(texts, shards))
    if len(ahead) < shards:
        fix = f"use --shards {len(ahead)}" if ahead else "check the inputs"
        raise ValueError(f"only {len(ahead)} documents for {shards} shards; {fix}")
    shard = -1
    while ahead:
        text, before = ahead.popleft()
        ahead.extend(itertools.islice(texts, 1))
        is_due = before * shards >= (shard + 1) * num_bytes
        if shard < shards - 1 and (is_due or len(ahead) < shards - 1 - shard):
            shard += 1
        yield shard, text


def _write_shards(folder: Path, assigned: Iterator[tuple[int, str]]) -> list[Shard]:
    shards = []
    numbered = ((shard, f"{number:010d}", text) for number, (shard, text) in enumerate(assigned))
    for shard, entries in itertools.groupby(numbered, key=lambda entry: entry[0]):
        samples = ((key, "txt", text.encode()) for _, key, text in entries)
        shards.append(_write_shard(folder / f"{shard:06d}.tar", samples))
    return shards


def _write_sides(
    folder: Path, texts: Iterator[tuple[str, float]], share: float, num_bytes: int, shards: int
) -> dict[str, list[Shard]]:
    """The shards for training and the one for validation, by folder, in one pass over the texts."""
    for side in (TRAIN, VALIDATION):
        (folder / side).mkdir()
    path, counts = folder / VALIDATION / "000000.tar", Counter({TRAIN: 0, VALIDATION: 0})
    with _open_shard(path) as write:
        rest = _without_held_out(texts, share, counts, write)
        packed = _write_shards(folder / TRAIN, _assign(rest, num_bytes, shards))
    return {TRAIN: packed, VALIDATION: [describe_shard(path, counts[VALIDATION])]}


def _without_held_out(
    texts: Iterator[tuple[str, float]],
    share: float,
    counts: Counter[str],
    write: Callable[[str, str, bytes], None],
) -> Iterator[tuple[str, float]]:
    """The texts for training; those for validation are written on the way.

    Args:
        counts: Of each side's texts, which grow.

    Raises:
        ValueError: In the end, if a side is empty.
    """
    for text, before in texts:
        if _is_held_out(text, share):
            write(f"{counts[VALIDATION]:010d}", "txt", text.encode())
            counts[VALIDATION] += 1
        else:
            counts[TRAIN] += 1
            yield text, before
    for side, fix in ((TRAIN, "lower"), (VALIDATION, "raise")):
        if counts.total() and not counts[side]:
            reason = f"--held-out {share} leaves none of {counts.total()} documents in {side}"
            raise ValueError(f"{reason}; {fix} it, or pack more of different text")


def _is_held_out(text: str, share: float) -> bool:
    """By the text alone, white space at its ends aside; what a small share holds out, every larger
    one does too."""
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _write_shard(path: Path, samples: Iterator[tuple[str, str, bytes]]) -> Shard:
    """Args: samples: Key, extension and content of the only member of each."""
    count = 0
    with _open_shard(path) as write:
        for sample in samples:
            write(*sample)
            count += 1
    return describe_shard(path, count)


@contextlib.contextmanager
def _open_shard(path: Path) -> Iterator[Callable[[str, str, bytes], None]]:
    """What writes a sample's key, and its only member's extension and content. Equal samples make
    equal bytes."""
    from webdataset import TarWriter  # imports torch

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:

        def write(key: str, extension: str, content: bytes) -> None:
            tar.write({"__key__": key, extension: content})
            tar.tarstream.members.clear()  # a list of all that was written, which nobody reads

        yield write
        tar.close()
        sync(file)
