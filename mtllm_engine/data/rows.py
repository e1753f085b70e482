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
        name = self._name(column)
        if name is None:
            columns = ", ".join(map(repr, self.values))
            raise ValueError(f"{self.where}: no column {column!r} among {columns}")
        return self.values[name]

    def has(self, column: str) -> bool:
        return self._name(column) is not None

    def _name(self, column: str) -> str | None:
        """What the file calls a column: as it is asked for, or in the only other case there is."""
        if column in self.values:
            return column
        alike = [name for name in self.values if _plain_name(name) == column.lower()]
        return alike[0] if len(alike) == 1 else None

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
        """The index of a class, given by its name, in any case, or itself; -1 where a published
        set hides it.

        Raises:
            ValueError: It is neither.
        """
        value, plain = self.value(column), [_plain_name(name) for name in names]
        if isinstance(value, str) and _plain_name(value) in plain:
            return plain.index(_plain_name(value))
        try:
            return self.number(column, -1, len(names) - 1)
        except ValueError:
            raise self.wrong(column, f"one of {', '.join(names)}, or its number") from None

    def wrong(self, column: str, expected: str) -> ValueError:
        shown = repr(self.value(column))
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


def hub(config: str, split: str) -> tuple[str, ...]:
    """The patterns, for `find`, of a split's Parquet files in a data set's repository on the hub:
    its own, then those that the hub makes of it (`refs/convert/parquet`), as now and as formerly.
    """
    forms = ("{}-*.parquet", "{}/*.parquet", "*-{}.parquet", "*-{}-*-of-*.parquet")
    return tuple(f"{config}/{form.format(split)}" for form in forms)


def read(
    path: Path, columns: Sequence[str] = (), needed: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of a `.tsv` (where a quote is a character), `.csv`, `.jsonl` or `.parquet` file.

    Args:
        columns: Names of a file's columns, in their order, that may come without a header.
        needed: Those of them that make a first row with their names a header, whatever else it
            names, in any order and case; all of them, where nothing is said.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".csv":
        return quoted(path, ",")
    return _plain(path, columns, columns if needed is None else needed)


def quoted(path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of a table as pandas writes it: fields may be quoted, and then hold newlines."""
    return _table(path, _quoted_lines(path, delimiter))


def xtreme(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one of XTREME's tables: quoted, without a header; those of a test set lack the
    last column, the label, which is then -1."""
    for number, fields in _quoted_lines(path, "\t"):
        if not fields:
            continue
        found = [*fields, "-1"] if len(fields) == len(columns) - 1 else fields
        if len(found) != len(columns):
            expected = f"{len(columns)}: {', '.join(columns)}"
            raise ValueError(f"{path}:{number}: {len(fields)} columns, not {expected}")
        yield Row(f"{path}:{number}", dict(zip(columns, found)))


def _quoted_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        limit = csv.field_size_limit(LONGEST_FIELD)
        try:
            for row in reader:
                yield reader.line_num, row
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


def _plain(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[Row]:
    lines = ((number, line.split("\t")) for number, line in _numbered_lines(path))
    return _table(path, lines, columns, needed)


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
    path: Path,
    lines: Iterable[tuple[int, list[str]]],
    columns: Sequence[str] = (),
    needed: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows by the names of a header, or of `columns` where the first row does not name those that
    are `needed`.

    Columns behind the last one that has a name are blank: the ends of lines in some files.
    """
    names: list[str] = []
    for number, fields in lines:
        if not any(fields):
            continue
        if not names:
            has_header = not columns or set(needed) <= {_plain_name(field) for field in fields}
            names = _names(path, number, fields, needed) if has_header else list(columns)
            if has_header:
                continue
        if len(fields) < len(names) or "".join(fields[len(names) :]).strip():
            expected = f"{len(names)}: {', '.join(names)}"
            raise ValueError(f"{path}:{number}: {len(fields)} columns, not {expected}")
        yield Row(f"{path}:{number}", dict(zip(names, fields)))


def _names(path: Path, number: int, fields: Sequence[str], needed: Sequence[str]) -> list[str]:
    """A header's names, the needed ones as they are asked for."""
    plain = [_plain_name(field) for field in fields]
    names = [each if each in needed else field.strip() for each, field in zip(plain, fields)]
    while not names[-1]:
        names.pop()
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{path}:{number}: two columns are called {twice[0]!r}")
    return names


def _plain_name(field: str) -> str:
    return field.strip().lower()


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
