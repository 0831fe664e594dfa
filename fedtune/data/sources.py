"""Reads a data source into tables named train, validation and test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedtune.data import (
    audio_samples,
    conversation_samples,
    image_samples,
    personal_data_samples,
    sentiment_samples,
    wordnet_samples,
)
from fedtune.data.class_folder import class_folder, has_metadata_table
from fedtune.data.file_digest import digest_files
from fedtune.data.listing import PARTS, files_in, parts_of
from fedtune.data.plug_in_sources import find_source_plug_in, list_source_plug_ins, read_plug_in_source
from fedtune.data.split_column import by_column
from fedtune.data.table import Table
from fedtune.data.text_files import text_files, with_places
from fedtune.errors import DataError, SourceError
from fedtune.recipe.data_settings import DataSettings
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["Found", "SettingKeys", "read_data_source"]


@dataclass(frozen=True)
class Found:
    """The splits of a source, and notes about assumptions made when reading it.

    ``removed`` is the number of rows that the filter removed.
    """

    parts: dict[str, Table]
    notes: tuple[str, ...] = ()
    removed: int = 0


class SettingKeys(NamedTuple):
    """The keys of the settings of a source, as messages name them."""

    source: str = "data.source"
    filter: str = "data.filter"
    map: str = "data.map"


_KEYS = SettingKeys()


def read_data_source(data: DataSettings, part: str = "train", keys: SettingKeys = _KEYS) -> Found:
    """Read the source's own splits with its own columns and those of ``map``, without the rows that are filtered out.

    There is always the split ``part``; a source without splits is all of it. If the source has one split only, a
    column may name the split of each row. A Hub id may be followed by a configuration, ``hub:ID:CONFIGURATION``, and a
    sample by a domain, ``sample:NAME:DOMAIN``.
    """
    source = str(data.source)
    found = _read(source, data, keys)
    if data.map is not None or data.filter is not None:
        found = _compute_columns(found, data, keys)
    if found.parts.keys() == {"train"}:
        found = replace(found, parts=by_column(found.parts["train"], data))
    parts = {each: found.parts[each] for each in PARTS if each in found.parts}
    if parts.keys() == {"train"}:
        parts = {part: parts["train"]}
    _check_parts(source, parts or found.parts, part)
    return replace(found, parts=parts)


def _read(source: str, data: DataSettings, keys: SettingKeys) -> Found:
    kind, _, name = source.partition(":")
    plug_in = find_source_plug_in(kind, __name__ if kind in _KINDS else None)
    if not name or (kind not in _KINDS and plug_in is None):
        added = "".join(f", {one}:NAME" for one in list_source_plug_ins())
        kinds = f"hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, text:FILE, folder:PATH, disk:FOLDER{added} or sample:NAME"
        raise SourceError(f"{keys.source} is {source!r}; write {kinds}")
    if data.tokens == "disk" and kind not in _ON_DISK:
        raise DataError(f"{source}: data.tokens: disk needs jsonl:FILE or parquet:FILE; set it to memory")
    if kind in _PATHS and not (path := Path(name).expanduser()).exists():
        raise DataError(f"there is no {path}; check {keys.source}")
    return _KINDS[kind](name, data) if plug_in is None else Found(read_plug_in_source(plug_in, name))


def _compute_columns(found: Found, data: DataSettings, keys: SettingKeys) -> Found:
    from fedtune.data.computed_columns import filter_rows, map_columns  # imported here: they need pyarrow

    parts = dict(found.parts)
    for each in found.parts:
        if data.map is not None:
            parts[each] = map_columns(parts[each], data.map, str(data.source), keys.map)
        if data.filter is not None:
            parts[each] = filter_rows(parts[each], data.filter, str(data.source), keys.filter)
    removed = sum(len(table) - len(parts[each]) for each, table in found.parts.items())
    return Found(parts, found.notes, removed)


def _check_parts(source: str, parts: Mapping[str, Table], part: str) -> None:
    if part not in parts:
        names = ", ".join(map(str, parts))
        raise DataError(f"{source} has no split named {part}, only {names}; choose another source")
    if not len(parts[part]):
        if others := [each for each in parts if each != part]:
            raise DataError(f"{source} has rows for {' and '.join(others)} only; bring some to train on")
        raise DataError(f"{source} holds no example; bring data")


def _hub(name: str, _data: DataSettings) -> Found:
    from fedtune.data.loaded import from_hub  # imported here: it takes half a second and 100 MB

    return Found(from_hub(name))


def _delimited(kind: str) -> Callable[[str, DataSettings], Found]:
    def read_text(name: str, data: DataSettings) -> Found:
        return Found(*text_files(kind, Path(name).expanduser(), data))

    return read_text


def _local(builder: str, *endings: str) -> Callable[[str, DataSettings], Found]:
    """Return a reader of local files through a builder of ``datasets``. The files of a folder are grouped by split."""

    def read_path(name: str, data: DataSettings) -> Found:
        from fedtune.data.loaded import from_files

        path = Path(name).expanduser()
        files = files_in(path, endings)
        if not files:
            raise DataError(f"{path} holds no file that ends in {' or '.join(endings)}; bring data")
        parts = parts_of(files, path, named=data.columns.split is not False)
        found = from_files(path, builder, data_files={part: list(map(str, of)) for part, of in parts.items()})
        placed = {part: _placed(table, data, path) for part, table in found.items()}
        if data.tokens == "memory":
            return Found(placed)
        return Found({part: replace(table, origin=digest_files(parts[part])) for part, table in placed.items()})

    return read_path


def _placed(table: Table, data: DataSettings, path: Path) -> Table:
    folder = path if path.is_dir() else path.parent
    for column in (data.columns.image, data.columns.audio):
        if column not in table.kinds:
            table = Table(with_places(table.columns, column, folder), table.kinds)
    return table


def _folder(name: str, data: DataSettings) -> Found:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DataError(
            f"{path} is no folder; name the folder that contains a folder of images or wav files for each class"
        )
    if not has_metadata_table(path):
        return Found(class_folder(path, parts=data.columns.split is not False))
    from fedtune.data.loaded import from_files

    return Found(from_files(path, "imagefolder", data_dir=str(path)))


def _disk(name: str, _data: DataSettings) -> Found:
    from fedtune.data.loaded import from_disk

    return Found(from_disk(Path(name).expanduser()))


def _sample(name: str, _data: DataSettings) -> Found:
    sample, _, domain = name.partition(":")
    if sample not in _SAMPLES:
        raise SourceError(f"there is no sample data {sample!r}; {suggest_nearest(sample, list(_SAMPLES))}")
    found = _SAMPLES[sample]()
    return Found({part: _of_domain(sample, table, domain) for part, table in found.items()} if domain else found)


def _of_domain(sample: str, table: Table, domain: str) -> Table:
    known = table.unique("domain") if "domain" in table.column_names else []
    if domain not in known:
        hint = suggest_nearest(domain, known) if known else "leave it out"
        raise SourceError(f"sample:{sample} has no domain {domain!r}; {hint}")
    return table.select(np.flatnonzero(np.asarray(table["domain"][:]) == domain))


_SAMPLES: dict[str, Callable[[], dict[str, Table]]] = {
    "chatterbot": conversation_samples.chatterbot,
    "digits": image_samples.digits,
    "fashion-mnist": image_samples.fashion_mnist,
    "films": sentiment_samples.films,
    "mnist-5k": image_samples.mnist_5k,
    "personal-data": personal_data_samples.personal_data,
    "replies": conversation_samples.replies,
    "sentiment": sentiment_samples.sentiment,
    "spoken-prompts": audio_samples.spoken_prompts,
    "wordnet-nouns": wordnet_samples.list_even_noun_definitions,
    "wordnet-nouns-all": wordnet_samples.list_noun_definitions,
}
_PATHS = frozenset({"csv", "disk", "folder", "jsonl", "parquet", "text"})
_ON_DISK = frozenset({"jsonl", "parquet"})
"""Kinds whose columns stay on the disk until they are asked for."""
_KINDS: dict[str, Callable[[str, DataSettings], Found]] = {
    "csv": _delimited("csv"),
    "disk": _disk,
    "folder": _folder,
    "hub": _hub,
    "jsonl": _local("json", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson"),
    "parquet": _local("parquet", ".parquet"),
    "sample": _sample,
    "text": _delimited("text"),
}
