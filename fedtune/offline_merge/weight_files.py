"""Which files of a folder hold its model: one alone, or shards, each of whose tensors is in exactly one of them.

Where a single file and the shards of an index lie side by side, plain transformers takes the first and other tools the
second: whatever is taken may be what was left behind by an earlier save.
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
    """The files; SourceError for a shard that is missing, and where it is not clear which files are the model."""
    if (folder / _INDEX).is_file():
        return _indexed(folder)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if len(files) > 1 or any(_SHARD.match(file.name) for file in files):
        _check_set(folder, [file.name for file in files])
    return files


def check_index(folder: Path, names: Iterable[str]) -> None:
    """SourceError for a tensor that the index names and no shard holds."""
    if not (folder / _INDEX).is_file():
        return
    lacking = sorted(_weight_map(folder).keys() - set(names))
    if lacking:
        raise SourceError(f"{folder / _INDEX} names {lacking[0]}, which its shards do not hold; fetch them again")


def check_once(places: Sequence[tuple[Path, Iterable[str]]]) -> None:
    """SourceError for a tensor that two files hold."""
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
    """The file of each tensor."""
    found: Any = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(_is_file_name(name) for name in found.values()):
        raise SourceError(f"{folder / _INDEX} does not say under weight_map where tensors are; fetch it again")
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _check_set(folder: Path, files: Sequence[str]) -> None:
    """SourceError unless files are all shards of one number, and none is missing."""
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
