"""Reads plain text sources: delimited files such as csv, and files with one example per line."""

from collections.abc import Mapping
from pathlib import Path

from fedtune.data.column import Column, Values, concatenate_columns, objects
from fedtune.data.delimited import lines, table
from fedtune.data.listing import files_in, parts_of
from fedtune.data.table import Table
from fedtune.errors import DataError
from fedtune.recipe.data_settings import DataSettings
from fedtune.recipe.expressions import list_columns

__all__ = ["text_files", "with_places"]

_ENDINGS = {"csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"), "text": (".txt", ".text", ".txt.gz")}


def text_files(kind: str, path: Path, data: DataSettings) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Read a file or a folder of files. Return the splits, and notes about guessed encodings."""
    files = files_in(path, _ENDINGS[kind])
    if not files:
        raise DataError(f"{path} holds no file that ends in {' or '.join(_ENDINGS[kind])}; bring data")
    read = {file: _read(kind, file, data) for file in files}
    guessed = [file for file in files if read[file][1]]
    notes = [
        f"{file} is no UTF-8 and was read as {read[file][1]}; set data.encoding if that is wrong" for file in guessed
    ]
    parts = parts_of(files, path, named=data.columns.split is not False)
    concatenate_columns = {part: _joined([(file, read[file][0]) for file in of]) for part, of in parts.items()}
    return {part: Table(found) for part, found in concatenate_columns.items()}, tuple(notes[:1])


def _read(kind: str, file: Path, data: DataSettings) -> tuple[dict[str, Column], str]:
    if kind == "text":
        return lines(file, data.encoding)
    columns = data.columns
    named = (columns.text, columns.image, columns.label, columns.group, columns.domain)
    computed = (name for text in (data.filter, *(data.map or {}).values()) if text for name in list_columns(text))
    wanted = [name for name in (*named, *computed) if name]
    found, guessed = table(file, data.delimiter, data.encoding, wanted, columns.label)
    return with_places(found, columns.image, file.parent), guessed


def with_places(found: Mapping[str, Column], column: str, folder: Path) -> dict[str, Column]:
    """Make relative paths of images in ``column`` absolute, relative to the folder of the file that lists them."""
    paths = found[column].values() if column in found else []
    if not any(isinstance(path, str) for path in paths):
        return dict(found)
    folder = folder.absolute()
    placed = (str(folder / path) if isinstance(path, str) else path for path in paths)
    return {**found, column: Values(objects(placed))}


def _joined(tables: list[tuple[Path, dict[str, Column]]]) -> dict[str, Column]:
    """Concatenate the rows of several files; DataError when their columns differ."""
    [(first, start), *others] = tables
    for file, other in others:
        if other.keys() != start.keys():
            odd = sorted(other.keys() ^ start.keys())[0]
            raise DataError(f"{file} and {first} differ in the column {odd!r}; give all files the same columns")
    return {name: _alike([found[name] for _, found in tables]) for name in start}


def _alike(columns: list[Column]) -> Column:
    """Concatenate columns. If only some files hold numbers, all values become text."""
    numbers = {type(column[0]) for column in columns if len(column)}
    return concatenate_columns(columns if len(numbers) < 2 else [column.texts() for column in columns])
