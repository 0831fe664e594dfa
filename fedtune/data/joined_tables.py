"""Joins the splits of several sources into one data set.

Each source is split before the join, so a weight changes the training split alone. A weight gives whole copies of each
training example; its fraction gives one more of as many examples, drawn with the seed in whole groups.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedtune.data.column import Rows, Values
from fedtune.data.joined_columns import join_column
from fedtune.data.listing import PARTS
from fedtune.data.splits import iter_contents, number_groups
from fedtune.data.table import Kind, Table
from fedtune.errors import DataError
from fedtune.seeds import derive_seed

__all__ = ["JoinedTables", "SourceTables", "join_sources"]


@dataclass(frozen=True)
class SourceTables:
    """The three splits of a source. ``drawn`` says that validation and test were both drawn by a hash."""

    title: str
    weight: float
    parts: Mapping[str, Table]
    drawn: bool


@dataclass(frozen=True)
class JoinedTables:
    """The splits of all sources, the examples that each source gives to each split, and notes."""

    parts: dict[str, Table]
    counts: list[dict[str, int]]
    notes: tuple[str, ...] = ()


def join_sources(sources: Sequence[SourceTables], seed: int) -> JoinedTables:
    """Join sources in their order; DataError when their columns differ or a weight leaves nothing of a source."""
    _check_columns(sources)
    parts = [dict(source.parts) for source in sources]
    removed = _remove_leaks(sources, parts)
    grouped = _needs_groups(sources)
    for number, source in enumerate(sources):
        if grouped:
            parts[number] = {part: _with_groups(table) for part, table in parts[number].items()}
        train = parts[number]["train"]
        rows = _weigh(train, source, derive_seed(seed, "weight", number))
        parts[number]["train"] = train if rows is None else train.select(rows)
    counts = [{part: len(tables[part]) for part in PARTS} for tables in parts]
    titles = [source.title for source in sources]
    joined = {part: _join([tables[part] for tables in parts], titles) for part in PARTS}
    note = f"{removed} examples also stand in a held-out split of another source and are left out of training"
    return JoinedTables(joined, counts, (f"data.sources: {note}",) if removed else ())


def _check_columns(sources: Sequence[SourceTables]) -> None:
    first, *others = sources
    wanted = set(first.parts["train"].column_names) - {"group"}
    for other in others:
        found = set(other.parts["train"].column_names) - {"group"}
        if odd := sorted(found ^ wanted):
            has, lacks = (first, other) if odd[0] in wanted else (other, first)
            raise DataError(
                f"{has.title} has the column {odd[0]!r}, and {lacks.title} has none; give each of data.sources columns "
                "or a map that makes the same ones"
            )


def _needs_groups(sources: Sequence[SourceTables]) -> bool:
    """Whether rows need a group: copies must stay with one client, and groups of some sources need a column in all."""
    present = ["group" in source.parts["train"].column_names for source in sources]
    return any(source.weight > 1 for source in sources) or (any(present) and not all(present))


def _with_groups(table: Table) -> Table:
    """Return the table with a group for each row: its own, or a digest of its content."""
    if "group" in table.column_names:
        return table
    digests = np.array([_digest(content) for content in iter_contents(table)], "U32")
    return replace(table.with_column("group", Values(digests)), origin=table.digest_rows())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _weigh(train: Table, source: SourceTables, seed: int) -> Rows | None:
    """Return the rows of a weighted training split, each as often as it counts; None for weight 1."""
    if source.weight == 1:
        return None
    copies, fraction = divmod(source.weight, 1)
    counts = np.full(len(train), int(copies))
    counts[_draw_groups(number_groups(train), fraction, seed)] += 1
    if len(train) and not counts.any():
        raise DataError(f"{source.title}: weight {source.weight:g} leaves none of {len(train)} examples; raise it")
    return np.repeat(np.arange(len(train)), counts)


def _draw_groups(group: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return which rows are drawn: whole groups in random order, as many as come nearest to the fraction."""
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    wanted = round(fraction * len(group))
    count = int(np.argmin(np.abs(np.concatenate([[0], ends]) - wanted)))
    return np.isin(group, order[:count])


def _remove_leaks(sources: Sequence[SourceTables], parts: Sequence[dict[str, Table]]) -> int:
    """Remove examples of training that stand in a held-out split of any source, and of validation that are tested.

    Hashes of the same kind cannot disagree, so this only concerns sources with splits of their own beside drawn ones,
    or groups beside none. Returns the number of training examples removed.
    """
    present = {"group" in source.parts["train"].column_names for source in sources}
    if all(source.drawn for source in sources) and len(present) == 1:
        return 0
    held: set[str] = set()
    removed = 0
    for part in ("test", "validation", "train"):
        keys = [_list_keys(tables[part]) for tables in parts]
        for tables, rows in zip(parts, keys, strict=True):
            kept = [row for row, own in enumerate(rows) if held.isdisjoint(own)]
            removed += (len(rows) - len(kept)) * (part == "train")
            tables[part] = tables[part] if len(kept) == len(rows) else tables[part].select(kept)
        held.update(key for rows in keys for own in rows for key in own)
    return removed


def _list_keys(table: Table) -> list[tuple[str, ...]]:
    """Return what must not stand in two splits, per row: the content, and the group if there is one."""
    contents = [_digest(content) for content in iter_contents(table)]
    if "group" not in table.column_names:
        return [(content,) for content in contents]
    return [(content, f"group {group}") for content, group in zip(contents, table["group"], strict=True)]


def _join(tables: Sequence[Table], titles: Sequence[str]) -> Table:
    columns, kinds = {}, dict[str, Kind]()
    for name in tables[0].column_names:
        found = [table.column(name) for table in tables]
        columns[name], kind = join_column(name, found, [table.kinds.get(name) for table in tables], titles)
        if kind is not None:
            kinds[name] = kind
    return Table(columns, kinds, origin=_join_origins(tables))


def _join_origins(tables: Sequence[Table]) -> str | None:
    """The digest of the origins and the selected rows of tables that are all on the disk."""
    digest = hashlib.sha256()
    for table in tables:
        if (origin := table.digest_rows()) is None:
            return None
        digest.update(f"{origin} {' '.join(table.column_names)} ".encode())
    return digest.hexdigest()
