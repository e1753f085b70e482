"""Rows of published tables (TSV, CSV, JSON, Parquet); errors name file, row and column."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_FIELD = 1 << 20  # characters, in a CSV file


class AbsentError(ValueError):
    """There is no file, or no row in it, for a split and language: not malformed, but not there."""


class Row(NamedTuple):
    """One row, and where it stands: `file:line`, or `file, row n` where a file has no lines."""

    where: str
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """Raises ValueError: There is no such column."""
        if column not in self.values:
            columns = ", ".join(map(repr, self.values))
            raise ValueError(f"{self.where}: no column {column!r} among {columns}")
        return self.values[column]

    def text(self, column: str, *, may_be_blank: bool = False) -> str:
        """What a column holds.

        Raises:
            ValueError: It is not there, or no text, or (unless it may be) only white space.
        """
        value = self.value(column)
        if not isinstance(value, str) or not (value.strip() or may_be_blank):
            raise self.wrong(column, "text")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise self.wrong(column, "text without half a surrogate pair")
        return value

    def text_or_empty(self, column: str) -> str:
        """As `text`, but a number is its digits and what is missing (null, NaN) is empty."""
        value = self.value(column)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self.text(column, may_be_blank=True)

    def number(self, column: str, least: int, most: int) -> int:
        """A whole number, also where it is written as text (`"2"`), or as pandas does (`2.0`).

        Raises:
            ValueError: It is not one in [least, most].
        """
        value = self.value(column)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not least <= number <= most or number != int(number):
            raise self.wrong(column, f"a whole number from {least} to {most}")
        return int(number)

    def label(self, column: str, names: Sequence[str]) -> int:
        """The index of a class, given by its name or itself; -1 where a published set hides it.

        Raises:
            ValueError: It is neither.
        """
        value = self.value(column)
        if isinstance(value, str) and value.strip() in names:
            return names.index(value.strip())
        try:
            return self.number(column, -1, len(names) - 1)
        except ValueError:
            raise self.wrong(column, f"one of {', '.join(names)}, or its number") from None

    def wrong(self, column: str, expected: str) -> ValueError:
        shown = repr(self.values[column])
        return ValueError(f"{self.where}: column {column!r} should be {expected}, not {shown[:80]}")


def find(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that any file matches, by name; patterns are layouts.

    Raises:
        AbsentError: There are none; the message says what was looked for.
    """
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise AbsentError(f"{folder} has no {' nor '.join(patterns)}")


def read(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a `.tsv` (where a quote is a character), `.csv`, `.jsonl` or `.parquet` file.

    Args:
        columns: Names of a file's columns that may come without a header; a first row of just these
            names is one.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".csv":
        return quoted(path, ",")
    return _plain(path, columns)


def quoted(path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of a table as pandas writes it: fields may be quoted, and then hold newlines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        limit = csv.field_size_limit(LONGEST_FIELD)
        try:
            yield from _table(path, ((reader.line_num, row) for row in reader), ())
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 after line {reader.line_num}") from None
        finally:
            csv.field_size_limit(limit)


def read_json(path: Path) -> Any:
    """Raises ValueError: The file is not JSON."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON") from None


def numbered(path: Path | str, rows: Iterable[Any], name: str = "row") -> Iterator[Row]:
    """Rows of a JSON list, from 1; raises ValueError for what is no object."""
    for number, row in enumerate(rows, start=1):
        yield _row(f"{path}, {name} {number}", row)


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: should be an object with columns, not {str(value)[:80]!r}")
    return Row(where, value)


def _plain(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    lines = ((number, line.split("\t")) for number, line in _numbered_lines(path))
    return _table(path, lines, columns)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines from 1, without their ends.

    Only a newline ends one, for texts hold other characters that do elsewhere; some files start
    with a BOM.
    """
    number = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 after line {number}") from None


def _table(
    path: Path, lines: Iterable[tuple[int, list[str]]], columns: Sequence[str]
) -> Iterator[Row]:
    header = list(columns)
    for number, fields in lines:
        if not header or (number == 1 and fields == header):
            header = fields
            continue
        if not any(fields):
            continue
        if len(fields) != len(header):
            expected = f"{len(header)}: {', '.join(header)}"
            raise ValueError(f"{path}:{number}: {len(fields)} columns, not {expected}")
        yield Row(f"{path}:{number}", dict(zip(header, fields)))


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not JSON") from None
        yield _row(f"{path}:{number}", row)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", row)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a sound Parquet file: {reason}") from None
