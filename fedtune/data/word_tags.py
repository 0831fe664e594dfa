"""Encodes words with one tag each, the labels of token classification."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.data.column import Values, objects
from fedtune.data.table import ClassLists, Table
from fedtune.data.unknown_names import require_known_names
from fedtune.errors import DataError

__all__ = ["encode_known_tags", "encode_tags"]


def encode_tags(
    found: Mapping[str, Table], source: str, known: Sequence[str] = ()
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Encode the column ``tags`` as one tag number per word. Return the splits and the tag names in order.

    The order is the one declared by the data set, else that of ``known`` if the names are the same, else alphabetical
    with ``O`` first. Raises DataError when words and tags do not match.
    """
    tags = {part: _read_tags(table, source) for part, table in found.items()}
    names = _order({name for rows in tags.values() for row in rows for name in row}, _told_names(found), known)
    if len(names) < 2:
        raise DataError(f"{source} has only the tag {next(iter(names), '')!r}; two or more are needed")
    return {part: _with_numbers(table, tags[part], names) for part, table in found.items()}, names


def encode_known_tags(table: Table, labels: Sequence[str], source: str) -> Table:
    """Encode the column ``tags`` with the tag names ``labels``; DataError for an unknown tag."""
    tags = _read_tags(table, source)
    require_known_names(tags, labels, source, "tag")
    return _with_numbers(table, tags, labels)


def _order(names: set[str], declared: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for order in (declared, known):
        if order and names <= set(order) and (order is declared or names == set(order)):
            return tuple(order)
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def _told_names(found: Mapping[str, Table]) -> tuple[str, ...]:
    kind = found["train"].kinds.get("tags")
    return kind.names if isinstance(kind, ClassLists) else ()


def _read_tags(table: Table, source: str) -> list[list[str]]:
    """Return the tag names of each row; DataError unless each word has one tag and no word is empty."""
    kind = table.kinds.get("tags")
    names = kind.names if isinstance(kind, ClassLists) else None
    found = []
    for row, (words, tags) in enumerate(zip(table["words"], table["tags"], strict=True), 1):
        where = f"{source}: row {row}"
        _check_words(words, where)
        if not isinstance(tags, list | tuple):
            raise DataError(f"{where} has no list of tags; name the column that has one in data.columns.tags")
        if len(tags) != len(words):
            raise DataError(f"{where} has {len(words)} words but {len(tags)} tags; give each word one tag")
        found.append([_name(tag, names, where) for tag in tags])
    return found


def _check_words(words: Any, where: str) -> None:
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where} has no list of words; name the column that has one in data.columns.words")
    if not all(word.strip() for word in words):
        raise DataError(f"{where} has an empty word, which no token stands for; drop it and its tag")


def _name(tag: Any, names: Sequence[str] | None, where: str) -> str:
    if tag is None or isinstance(tag, Mapping | list | tuple):
        raise DataError(f"{where} has a tag that is no name or number; write one per word")
    if names is None:
        return str(tag)
    if not isinstance(tag, int) or not 0 <= tag < len(names):
        raise DataError(f"{where} has the tag {tag!r}, which is none of the {len(names)} that the data set names")
    return names[tag]


def _with_numbers(table: Table, tags: Sequence[Sequence[str]], order: Sequence[str]) -> Table:
    numbers = {name: number for number, name in enumerate(order)}
    return table.with_column("tags", Values(objects([numbers[name] for name in row] for row in tags)))
