"""Text files as tables: rows of fields between delimiters, or a line per example."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fedtune.data.encoding import decoded
from fedtune.errors import DataError

__all__ = ["MISSING", "lines", "table"]

DELIMITERS = (",", ";", "\t", "|")
MISSING = frozenset({"na", "n/a", "nan", "null", "none", "#n/a", "?", "-"})
"""Words that stand for no value among numbers, and only there."""
_LONGEST_BLOCK = 1 << 28


def table(
    path: Path, delimiter: str | None, encoding: str | None, wanted: Sequence[str], label: str
) -> tuple[pa.Table, str]:
    """A table of strings as they are written; only the column ``label`` holds numbers where all its fields are some.

    An empty field is null, and nothing else is. The delimiter is by default the one that makes the heading name most
    of the ``wanted`` columns. The second value says what encoding was guessed, if one was. DataError tells the row
    that does not have as many fields as the heading.
    """
    text, guessed = decoded(_content(path), encoding, str(path))
    if not text.strip():
        raise DataError(f"{path} holds no example; bring data")
    by = delimiter or _delimiter(text, wanted)
    heading = _heading(text, by, path)
    found = _parsed(text, by, heading, path)
    if label in heading:
        number = heading.index(label)
        found = found.set_column(number, label, _as_numbers(found[label], path, label))
    return found, guessed


def lines(path: Path, encoding: str | None) -> tuple[pa.Table, str]:
    """A row for each line that is not blank, in a column ``text``."""
    text, guessed = decoded(_content(path), encoding, str(path))
    kept = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    return pa.table({"text": pa.array(kept, pa.string())}), guessed


def _content(path: Path) -> bytes:
    """The file's bytes, unpacked where its ending says that it is compressed."""
    try:
        with pa.input_stream(path, compression="detect") as stream:
            content: bytes = stream.read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}; mend the file") from error
    return content


def _delimiter(text: str, wanted: Sequence[str]) -> str:
    """The delimiter whose heading has most of the wanted columns; the first of several, and of none."""
    headings = {by: next(csv.reader(io.StringIO(text[: 1 << 16]), delimiter=by), []) for by in DELIMITERS}
    return max(DELIMITERS, key=lambda by: len({name.strip() for name in headings[by]} & set(wanted)))


def _heading(text: str, delimiter: str, path: Path) -> list[str]:
    rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    heading = next((row for row in rows if row), [])
    twice = [name for name in heading if name and heading.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}; rename one")
    return heading


def _parsed(text: str, delimiter: str, heading: list[str], path: Path) -> pa.Table:
    wrong: list[pyarrow.csv.InvalidRow] = []

    def refuse(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    content = text.encode()
    try:
        found = pyarrow.csv.read_csv(
            io.BytesIO(content),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, _LONGEST_BLOCK)),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(heading, pa.string()), strings_can_be_null=True, null_values=[""]
            ),
        )
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as csv: {reason}; mend the file") from error
    if wrong:
        one = wrong[0]
        raise DataError(
            f"{path}: row {one.number - 1} has {one.actual_columns} fields, the heading {one.expected_columns}; put "
            "fields that hold the delimiter in quotes and close them, or set data.delimiter"
        )
    return found


def _as_numbers(column: pa.ChunkedArray, path: Path, label: str) -> pa.ChunkedArray:
    """Whole or real numbers where all fields are some; a code such as 007 stays text."""
    values = [value for value in pc.unique(column).to_pylist() if value is not None]
    numbers = [value for value in values if _is_number(value)]
    gaps = [value for value in values if value.strip().casefold() in MISSING]
    if numbers and gaps and len(numbers) + len(gaps) == len(values):
        row = pc.index(column, pa.scalar(gaps[0])).as_py() + 1
        raise DataError(
            f"{path}: row {row} has no value in column {label!r}, only a word for none among numbers; "
            "fill it or drop the row"
        )
    if not numbers or len(numbers) < len(values):
        return column
    trimmed = pc.utf8_trim_whitespace(column)
    if all(value.strip().lstrip("+-").isdecimal() for value in values):
        return trimmed.cast(pa.int64())
    return trimmed.cast(pa.float64())


def _is_number(text: str) -> bool:
    bare = text.strip().lstrip("+-")
    if bare.isdecimal():
        return bare.isascii() and (bare == "0" or not bare.startswith("0")) and len(bare) < 19
    try:
        return bare.casefold() not in ("nan", "inf", "infinity") and float(text) is not None
    except ValueError:
        return False
