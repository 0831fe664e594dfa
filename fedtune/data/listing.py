"""Groups the files of a folder by the split in their names: train, validation or test."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedtune.errors import DataError

__all__ = ["PARTS", "files_in", "part_named", "parts_of"]

PARTS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"validation", "valid", "dev", "val"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
}
"""Names of the splits and their synonyms, as on the Hugging Face Hub."""


def part_named(word: str) -> str | None:
    """Return the split that a word names, or None."""
    return next((part for part, words in PARTS.items() if word.strip().casefold() in words), None)


def files_in(path: Path, endings: Sequence[str]) -> list[Path]:
    """Return the file itself, or all files below a folder with one of the extensions, sorted by path.

    Hidden files are left out.
    """
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.name.lower().endswith(tuple(endings)) and file.is_file())
    return sorted((file for file in found if not _hidden(file.relative_to(path))), key=str)


def parts_of(files: Sequence[Path], folder: Path, *, named: bool, by_file: bool = True) -> dict[str, list[Path]]:
    """Group files by split. All files are ``train`` if no name contains a split, or if ``named`` is false.

    The split is taken from a folder's name or, with ``by_file``, from a word in the file's name. Raises DataError when
    only some of the files name a split: otherwise held-out data could be used for training.
    """
    if not named or len(files) == 1:
        return {"train": list(files)}
    split_of = {file: _part(file.relative_to(folder), by_file=by_file) for file in files}
    if not any(split_of.values()):
        return {"train": list(files)}
    without = next((file for file in files if split_of[file] is None), None)
    if without is not None:
        raise DataError(
            f"{folder}: the name of {without.relative_to(folder)} says neither train, validation nor test, as those "
            "beside it do; rename it, move it away, or set data.columns.split: false to take all files together"
        )
    return {part: of for part in PARTS if (of := [file for file in files if split_of[file] == part])}


def _part(file: Path, *, by_file: bool) -> str | None:
    folders = (part_named(name) for name in file.parts[:-1])
    words: Iterable[str] = re.split(r"[\W\d_]+", file.name) if by_file else ()
    return next((part for part in (*folders, *map(part_named, words)) if part is not None), None)


def _hidden(file: Path) -> bool:
    return any(name.startswith((".", "__")) for name in file.parts)
