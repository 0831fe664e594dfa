"""The files of a folder that contain its model: one file, or shards that contain each tensor once.

If a single file and an index with shards are in the same folder, plain transformers reads the first and other tools the
second. One of them may be left over from an earlier save.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import SourceError
from fedtune.offline_merge.json_file import read_json

__all__ = ["check_index", "check_once", "shards"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors$")


def shards(folder: Path) -> tuple[Path, ...]:
    """Return the files; SourceError if a shard is missing or the choice is ambiguous."""
    if (folder / _INDEX).is_file():
        return _indexed(folder)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if len(files) > 1 or any(_SHARD.match(file.name) for file in files):
        _check_set(folder, [file.name for file in files])
    return files


def check_index(folder: Path, names: Iterable[str]) -> None:
    """Raise SourceError for a tensor that the index names and no shard contains."""
    if not (folder / _INDEX).is_file():
        return
    lacking = sorted(_weight_map(folder).keys() - set(names))
    if lacking:
        raise SourceError(f"{folder / _INDEX} names {lacking[0]}, which its shards do not hold; fetch them again")


def check_once(places: Sequence[tuple[Path, Iterable[str]]]) -> None:
    """Raise SourceError for a tensor that is in two files."""
    owners: dict[str, Path] = {}
    for file, names in places:
        for name in names:
            if name in owners:
                raise SourceError(
                    f"{file.parent} holds {name} twice, in {owners[name].name} and {file.name}; remove the files that "
                    "are not of the model"
                )
            owners[name] = file


def _indexed(folder: Path) -> tuple[Path, ...]:
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if (folder / _SINGLE).is_file() and folder / _SINGLE not in files:
        raise SourceError(
            f"{folder} holds two models, {_SINGLE} and the shards of {_INDEX}; remove the one that is not meant"
        )
    for file in files:
        if not file.is_file():
            raise SourceError(f"{folder / _INDEX} names the shard {file.name}, which is missing; fetch it again")
    return tuple(files)


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Return the file of each tensor."""
    found: Any = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(_is_file_name(name) for name in found.values()):
        raise SourceError(f"{folder / _INDEX} does not say under weight_map where tensors are; fetch it again")
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _check_set(folder: Path, files: Sequence[str]) -> None:
    """Raise SourceError unless the files are all shards of one set."""
    matches = [_SHARD.match(name) for name in files]
    sets = {
        (match["stem"], int(match["count"])) if match else (name, 1) for name, match in zip(files, matches, strict=True)
    }
    if len(sets) > 1:
        raise SourceError(
            f"{folder} holds {files[0]} and {files[-1]}, and neither {_SINGLE} nor {_INDEX}, so that it is not clear "
            "which are the model; remove what is not"
        )
    [(stem, count)] = sets
    there = {int(match["number"]) for match in matches if match} or {1}
    if len(there) < count:
        lacking = next(number for number in itertools.count(1) if number not in there)
        raise SourceError(f"{folder} lacks shard {lacking} of {count} of {stem}; fetch it again")
