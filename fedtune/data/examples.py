"""Reads the examples of a recipe with canonical columns: of one source, of one source per split, or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedtune.data.columns import rename_columns
from fedtune.data.decode import readable
from fedtune.data.joined_columns import align_columns
from fedtune.data.joined_tables import SourceTables, join_sources
from fedtune.data.listing import PARTS
from fedtune.data.sources import Found, SettingKeys, read_data_source
from fedtune.data.splits import split_dataset
from fedtune.data.table import Pictures, Table
from fedtune.errors import DataError
from fedtune.recipe.joined_source import JoinedSource
from fedtune.recipe.schema import DataSettings, Recipe

__all__ = ["Examples", "SourceCounts", "read_examples"]

_NO_SOURCES = dict.fromkeys(("train", "validation", "test", "sources"))


@dataclass(frozen=True)
class SourceCounts:
    """The rows of a source that the filter kept and removed.

    For a joined source, ``parts`` are the examples that it gives to each split, with its weight.
    """

    source: str
    name: str
    rows: int
    removed: int
    weight: float = 1.0
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """The splits that the data have of themselves, and notes. Plain sources are not counted."""

    parts: dict[str, Table]
    notes: tuple[str, ...] = ()
    sources: tuple[SourceCounts, ...] = ()


def read_examples(recipe: Recipe, columns: Sequence[str]) -> Examples:
    """Read the examples; DataError names the source that does not fit the task or the others."""
    if recipe.data.sources is not None:
        return _read_joined(recipe, columns, recipe.data.sources)
    if recipe.data.train is not None:
        return _read_own_splits(recipe, columns)
    found = _read_source(recipe, columns, "train", SettingKeys())
    counted = recipe.data.filter is not None or recipe.data.map is not None
    return Examples(found.parts, found.notes, (_count(recipe.data, found, ""),) if counted else ())


def _read_own_splits(recipe: Recipe, columns: Sequence[str]) -> Examples:
    """Read each split from the source that ``data`` names for it. Others that the source of train has are kept."""
    parts: dict[str, Table] = {}
    notes: list[str] = []
    counts: list[SourceCounts] = []
    named = [part for part in PARTS if getattr(recipe.data, part) is not None]
    for part in named:
        data = recipe.data.model_copy(update={**_NO_SOURCES, "source": getattr(recipe.data, part)})
        found = _read_source(_with_data(recipe, data), columns, part, SettingKeys(f"data.{part}"))
        own = {each: found.parts[each] for each in (part, *_list_unnamed(part, named)) if each in found.parts}
        parts |= own
        notes += found.notes
        counts.append(_count(data, replace(found, parts=own), part))
    _check_forms(recipe.data.title, parts)
    titles = [str(getattr(recipe.data, part) or recipe.data.train) for part in parts]
    return Examples(_align_splits(parts, titles), tuple(notes), tuple(counts))


def _align_splits(parts: dict[str, Table], titles: list[str]) -> dict[str, Table]:
    """Give labels of splits from different files one type and one list of classes; DataError if that cannot be."""
    for name in ("image", "label", "labels", "tags"):
        tables = list(parts.values())
        if name not in tables[0].column_names:
            continue
        kinds = [table.kinds.get(name) for table in tables]
        columns, kind = align_columns(name, [table.column(name) for table in tables], kinds, titles)
        if len(set(kinds)) > 1:
            aligned = zip(parts, tables, columns, strict=True)
            parts = {part: table.with_column(name, column, kind) for part, table, column in aligned}
    return parts


def _list_unnamed(part: str, named: Sequence[str]) -> list[str]:
    return [each for each in PARTS if each not in named] if part == "train" else []


def _read_joined(recipe: Recipe, columns: Sequence[str], sources: list[JoinedSource]) -> Examples:
    """Read several sources, split each, and join their splits."""
    read: list[SourceTables] = []
    notes: list[str] = []
    counts: list[SourceCounts] = []
    for number, source in enumerate(sources):
        data = _resolve_source(recipe.data, source)
        found = _read_source(_with_data(recipe, data), columns, "train", _name_keys(source, number), source.name)
        drawn = found.parts.keys() == {"train"}
        read.append(SourceTables(source.source, source.weight, split_dataset(data, found.parts), drawn))
        notes += found.notes
        counts.append(replace(_count(data, found, source.name or ""), weight=source.weight))
    joined = join_sources(read, recipe.seed)
    counts = [replace(one, parts=parts) for one, parts in zip(counts, joined.counts, strict=True)]
    return Examples(joined.parts, (*notes, *joined.notes), tuple(counts))


def _resolve_source(data: DataSettings, source: JoinedSource) -> DataSettings:
    """Return the settings of one joined source: its own, or else those of ``data``."""
    own = {
        key: value
        for key in ("columns", "filter", "map", "delimiter", "encoding")
        if (value := getattr(source, key)) is not None
    }
    return data.model_copy(update={**_NO_SOURCES, "source": source.source, **own})


def _name_keys(source: JoinedSource, number: int) -> SettingKeys:
    here = f"data.sources.{number}"
    own = [here if getattr(source, key) is not None else "data" for key in ("filter", "map")]
    return SettingKeys(f"{here}.source", f"{own[0]}.filter", f"{own[1]}.map")


def _with_data(recipe: Recipe, data: DataSettings) -> Recipe:
    return recipe.model_copy(update={"data": data})


def _read_source(
    recipe: Recipe, columns: Sequence[str], part: str, keys: SettingKeys, name: str | None = None
) -> Found:
    """Read one source with canonical columns, without skipped images. A name is the domain of its examples."""
    source = read_data_source(recipe.data, part, keys)
    if name is not None and recipe.data.columns.domain is None:
        parts = {each: table.with_constant("domain", name) for each, table in source.parts.items()}
        source = replace(source, parts=parts)
        named = recipe.data.columns.model_copy(update={"domain": "domain"})
        recipe = _with_data(recipe, recipe.data.model_copy(update={"columns": named}))
    found = {each: rename_columns(recipe, columns, table) for each, table in source.parts.items()}
    _check_forms(recipe.data.title, found)
    if not isinstance(found[part].kinds.get("image"), Pictures):
        return replace(source, parts=found)
    return _leave_out_unreadable(recipe.data, replace(source, parts=found))


def _leave_out_unreadable(data: DataSettings, source: Found) -> Found:
    found, lost = dict(source.parts), list[str]()
    for part, table in source.parts.items():
        found[part], names = readable(table, skip=data.skip_unreadable)
        lost += names
    note = f"{data.title}: {len(lost)} images cannot be read and are left out, among them {lost[0]}" if lost else ""
    return replace(source, parts=found, notes=(*source.notes, *([note] if note else [])))


def _check_forms(title: str, found: dict[str, Table]) -> None:
    if len({"messages" in table.column_names for table in found.values()}) > 1:
        raise DataError(f"{title} has texts in one part and conversations in another; name the task's format")


def _count(data: DataSettings, found: Found, name: str) -> SourceCounts:
    return SourceCounts(str(data.source), name, sum(map(len, found.parts.values())), found.removed)
