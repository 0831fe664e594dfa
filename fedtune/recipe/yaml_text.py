"""Reads YAML of limited size. A few hundred bytes of aliases can expand to more values than fit in memory."""

from typing import Any

import yaml

from fedtune.recipe.validation_errors import Location

__all__ = ["YamlError", "documents", "load", "load_with_lines"]

_LONGEST = 1 << 18
"""The largest number of characters of a document. PyYAML reads about 100,000 per second."""
_MOST_VALUES = 20_000
"""The largest number of values of a document with all aliases expanded. The longest recipes have a few hundred."""


class YamlError(ValueError):
    """An invalid or too large YAML text. The message gives the reason without the name of the text."""


def load(text: str) -> Any:
    """Return the value of a document; YamlError when it is invalid or too large."""
    return load_with_lines(text)[0]


def load_with_lines(text: str) -> tuple[Any, dict[Location, int]]:
    """Return the value and the line (from 1) of every key and list item; YamlError when it is invalid or too large."""
    _check_length(text)
    try:
        return _read(yaml.SafeLoader(text))
    except YamlError:
        raise
    except RecursionError as error:
        raise YamlError("is not YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: also an invalid date
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from error


def documents(text: str) -> list[str]:
    """Return the documents of a text that are not empty, preceded by blank lines so that line numbers stay the same.

    A text without such a document is returned as the only one. Raises YamlError when it is invalid or too large.
    """
    _check_length(text)
    found: list[str] = []
    first, lines, filled = 0, 0, False
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.DocumentStartEvent) and event.start_mark is not None:
                begin, filled = event.start_mark, False
                first, lines = begin.index - begin.column, begin.line
            elif isinstance(event, yaml.DocumentEndEvent) and event.end_mark is not None:
                found += ["\n" * lines + text[first : event.end_mark.index]] if filled else []
            elif not (isinstance(event, yaml.ScalarEvent) and not event.value and event.implicit[0]):
                filled = True
    except yaml.YAMLError as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from error
    return found or [text]


def _check_length(text: str) -> None:
    if len(text) > _LONGEST:
        raise YamlError(f"holds {len(text)} characters, and {_LONGEST} are allowed; write less")


def _read(loader: yaml.SafeLoader) -> tuple[Any, dict[Location, int]]:
    node = loader.get_single_node()
    if node is None:
        return None, {}
    if _values(node, {}) > _MOST_VALUES:
        raise YamlError(f"stands for more than {_MOST_VALUES} values once its aliases are written out; use fewer")
    lines = _lines(node)  # first, because construction resolves merge keys in the nodes
    return loader.construct_document(node), lines


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node with aliases expanded. Each node is visited only once."""
    if id(node) not in known:
        known[id(node)] = 0
        children = [child for pair in _pairs(node) for child in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    elif not known[id(node)]:
        raise YamlError("is not YAML: an alias stands inside itself")
    return known[id(node)]


def _pairs(node: yaml.Node) -> list[tuple[yaml.Node, ...]]:
    if isinstance(node, yaml.MappingNode):
        return list(node.value)
    return [(child,) for child in node.value] if isinstance(node, yaml.SequenceNode) else []


def _lines(node: yaml.Node, at: Location = ()) -> dict[Location, int]:
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, key, child) for key, child in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(index, child, child) for index, child in enumerate(node.value)]
    else:
        return {}
    found: dict[Location, int] = {}
    for key, marked, child in pairs:
        found[(*at, key)] = marked.start_mark.line + 1
        found |= _lines(child, (*at, key))
    return found
