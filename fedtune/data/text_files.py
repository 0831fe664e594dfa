"""Sources of plain text: csv files and their kin, or files with an example a line."""

from pathlib import Path

import pyarrow as pa

from fedtune.data.delimited import lines, table
from fedtune.data.listing import files_in, parts_of
from fedtune.data.table import Table
from fedtune.errors import DataError
from fedtune.examples import Data

__all__ = ["text_files", "with_places"]

_ENDINGS = {"csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"), "text": (".txt", ".text", ".txt.gz")}


def text_files(kind: str, path: Path, data: Data) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The parts in a file or a folder of files of a kind, and what was guessed of their encoding."""
    files = files_in(path, _ENDINGS[kind])
    if not files:
        raise DataError(f"{path} holds no file that ends in {' or '.join(_ENDINGS[kind])}; bring data")
    read = {file: _read(kind, file, data) for file in files}
    guessed = [file for file in files if read[file][1]]
    notes = [
        f"{file} is no UTF-8 and was read as {read[file][1]}; set data.encoding if that is wrong" for file in guessed
    ]
    parts = parts_of(files, path, named=data.columns.split is not False)
    joined = {part: _joined([(file, read[file][0]) for file in of]) for part, of in parts.items()}
    return {part: Table(found) for part, found in joined.items()}, tuple(notes[:1])


def _read(kind: str, file: Path, data: Data) -> tuple[pa.Table, str]:
    if kind == "text":
        return lines(file, data.encoding)
    columns = data.columns
    wanted = [name for name in (columns.text, columns.image, columns.label, columns.group, columns.domain) if name]
    found, guessed = table(file, data.delimiter, data.encoding, wanted, columns.label)
    return with_places(found, columns.image, file.parent), guessed


def with_places(found: pa.Table, column: str, folder: Path) -> pa.Table:
    """Paths of pictures in ``column`` that are relative, as seen from the folder of the file that lists them."""
    if column not in found.column_names or not pa.types.is_string(found.schema.field(column).type):
        return found
    folder = folder.absolute()
    paths = [None if path is None else str(folder / path) for path in found[column].to_pylist()]
    return found.set_column(found.column_names.index(column), column, pa.chunked_array([pa.array(paths, pa.string())]))


def _joined(tables: list[tuple[Path, pa.Table]]) -> pa.Table:
    """The rows of several files one after another; DataError when one lacks a column of the first."""
    [(first, start), *others] = tables
    for file, other in others:
        if set(other.column_names) != set(start.column_names):
            odd = sorted(set(other.column_names) ^ set(start.column_names))[0]
            raise DataError(f"{file} and {first} differ in the column {odd!r}; give all files the same columns")
    same = [start, *(other.select(start.column_names) for _, other in others)]
    kinds = {name: {one.schema.field(name).type for one in same} for name in start.column_names}
    return pa.concat_tables([_as_text(one, kinds) for one in same])


def _as_text(found: pa.Table, kinds: dict[str, set[pa.DataType]]) -> pa.Table:
    """Columns that hold numbers in some files only, as text in all."""
    fields = [pa.field(name, pa.string() if len(kinds[name]) > 1 else found.schema.field(name).type) for name in kinds]
    return found.cast(pa.schema(fields))
