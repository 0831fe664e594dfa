"""Reads text files as tables: delimited rows of fields, or one example per line."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.data.column import Column, Values, objects
from fedtune.data.encoding import decode_text
from fedtune.errors import DataError

__all__ = ["MISSING", "lines", "table"]

DELIMITERS = (",", ";", "\t", "|")
MISSING = frozenset({"na", "n/a", "nan", "null", "none", "#n/a", "?", "-"})
"""Strings that mean a missing value in a column of numbers. In other columns they are ordinary text."""


def table(
    path: Path, delimiter: str | None, encoding: str | None, wanted: Sequence[str], label: str
) -> tuple[dict[str, Column], str]:
    """Read a delimited file. Return its columns and the encoding if it was guessed, else an empty string.

    All columns hold strings, except that ``label`` holds numbers if all its fields are numbers. Only an empty field is
    null. By default the delimiter is the one whose header contains most of the ``wanted`` columns. Raises DataError
    with the number of a row whose fields do not match the header.
    """
    text, guessed = decode_text(_content(path), encoding, str(path))
    if not text.strip():
        raise DataError(f"{path} holds no example; bring data")
    text, declared = _told_delimiter(text)
    by = delimiter or declared or _delimiter(text, wanted, path)
    heading = _heading(text, by, path)
    found = _parsed(text, by, heading, path)
    columns: dict[str, Column] = {name: Values(objects(fields)) for name, fields in found.items()}
    if label in heading:
        columns[label] = _as_numbers(found[label], path, label)
    return columns, guessed


def lines(path: Path, encoding: str | None) -> tuple[dict[str, Column], str]:
    """Read a text file. Return a column ``text`` with one row per line that is not blank, and the guessed encoding."""
    text, guessed = decode_text(_content(path), encoding, str(path))
    kept = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    return {"text": Values(objects(kept))}, guessed


def _content(path: Path) -> bytes:
    """Return the file's bytes, decompressed if the name ends in ``.gz``."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise DataError(f"{path} cannot be read: {reason}; fix the file") from error


def _told_delimiter(text: str) -> tuple[str, str | None]:
    """Remove a first line such as ``sep=;``, which spreadsheets write. Return the text and that delimiter, if any."""
    first, _, rest = text.partition("\n")
    match = re.fullmatch(r"sep=(.)\r?", first)
    return (rest, match[1]) if match else (text, None)


def _delimiter(text: str, wanted: Sequence[str], path: Path) -> str:
    """Return the delimiter whose header has most of the wanted columns; the first one in a tie."""
    headings = {by: _first_row(text[: 1 << 16], by, path) for by in DELIMITERS}
    return max(DELIMITERS, key=lambda by: len({name.strip() for name in headings[by]} & set(wanted)))


def _heading(text: str, delimiter: str, path: Path) -> list[str]:
    heading = _first_row(text, delimiter, path)
    twice = [name for name in heading if name and heading.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}; rename one")
    return heading


def _first_row(text: str, delimiter: str, path: Path) -> list[str]:
    try:
        return next((row for row in csv.reader(io.StringIO(text, newline=None), delimiter=delimiter) if row), [])
    except csv.Error as error:
        raise DataError(f"{path} has no heading: {error}; fix the file") from error


def _parsed(text: str, delimiter: str, heading: list[str], path: Path) -> dict[str, list[str | None]]:
    """Return the fields of each column as strings; None for an empty field."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: list[list[str | None]] = [[] for _ in heading]
    try:
        rows = (row for row in reader if row)
        next(rows)
        for number, row in enumerate(rows, 1):
            if len(row) != len(heading):
                raise DataError(
                    f"{path}: row {number} has {len(row)} fields, the heading {len(heading)}; put fields that hold the "
                    "delimiter in quotes and close them, or set data.delimiter"
                )
            for fields, field in zip(found, row, strict=True):
                fields.append(field or None)
    except csv.Error as error:
        number = len(found[0]) + 1
        raise DataError(f"{path}: row {number} cannot be read as csv ({error}); close and double its quotes") from error
    return dict(zip(heading, found, strict=True))


def _as_numbers(fields: list[str | None], path: Path, label: str) -> Column:
    """Return integers or floats if all fields are numbers, else strings without surrounding blanks.

    A code such as 007 is not a number.
    """
    fields = [None if field is None else field.strip() or None for field in fields]
    values = {value for value in fields if value is not None}
    numbers = [value for value in values if _is_number(value)]
    gaps = {value for value in values if value.casefold() in MISSING}
    if numbers and gaps and len(numbers) + len(gaps) == len(values):
        row = next(row for row, value in enumerate(fields, 1) if value in gaps)
        raise DataError(
            f"{path}: row {row} has no value in column {label!r}, only a word for none among numbers; "
            "fill it or drop the row"
        )
    if not numbers or len(numbers) < len(values):
        return Values(objects(fields))
    kind = int if all(value.lstrip("+-").isdecimal() for value in values) else float
    if None in fields:
        return Values(objects(None if value is None else kind(value) for value in fields))
    return Values(np.array([kind(value) for value in fields if value is not None], np.int64 if kind is int else float))


def _is_number(text: str) -> bool:
    bare = text.lstrip("+-")
    if bare.isdecimal():
        return bare.isascii() and (bare == "0" or not bare.startswith("0")) and len(bare) < 19
    try:
        return bare.casefold() not in ("nan", "inf", "infinity") and float(text) is not None
    except ValueError:
        return False
