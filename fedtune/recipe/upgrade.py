"""Rewrites a recipe of version 1 in version 2.

Only the text of changed keys and values is replaced. Comments, order and layout stay the same.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import yaml

from fedtune.errors import RecipeError
from fedtune.recipe.version_names import UNIT_LISTS, UNIT_NAMES
from fedtune.recipe.versions import (
    VERSION,
    needs_translation,
    translate_key,
    translate_unit_setting,
    translate_value,
)
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.recipe.yaml_text import load

__all__ = ["upgrade_recipe_text"]


class _Edit(NamedTuple):
    """The new text for the characters from ``start`` to ``end``."""

    start: int
    end: int
    text: str


def upgrade_recipe_text(text: str, origin: str) -> str:
    """Return the text of a recipe in the newest version. A text of that version is returned unchanged.

    Raises RecipeError when the recipe is invalid, or when its meaning would change, as with some anchors.
    """
    before = parse_recipe(text, origin)
    if not needs_translation(load(text)):
        return text
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # parse_recipe raises for all others
    upgraded = _apply({*_version_edits(root, text), *_mapping_edits(root, "")}, text)
    if not _means_the_same(upgraded, before.model_dump_json()):
        raise RecipeError(
            f"{origin} cannot be upgraded where it stands: an anchor or a merge key is used in places that now differ; "
            "write what it stands for in each place"
        )
    return upgraded


def _means_the_same(upgraded: str, before: str) -> bool:
    try:
        return parse_recipe(upgraded, "the upgraded recipe").model_dump_json() == before
    except RecipeError:
        return False


def _apply(edits: set[_Edit], text: str) -> str:
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def _version_edits(root: yaml.MappingNode, text: str) -> Iterator[_Edit]:
    """Write the version as the first key, or replace the version that is there."""
    written = [value for key, value in root.value if key.value == "version"]
    if written:
        yield _Edit(written[0].start_mark.index, written[0].end_mark.index, str(VERSION))
        return
    start = root.start_mark.index + bool(root.flow_style)
    newline = "\r\n" if "\r\n" in text else "\n"
    behind = ", " if root.flow_style else newline + " " * root.start_mark.column
    yield _Edit(start, start, f"version: {VERSION}{behind}")


def _mapping_edits(node: yaml.Node, key: str) -> Iterator[_Edit]:
    """Yield the edits of a node below a key of version 2."""
    if isinstance(node, yaml.ScalarNode):
        yield from _replace(node, lambda value: str(translate_value(key, value)))
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _unit_edits(entry) if key in UNIT_LISTS else _mapping_edits(entry, key)
    elif isinstance(node, yaml.MappingNode):
        for name, entry in node.value:
            if _merges(name):
                yield from _mapping_edits(entry, key)
                continue
            new = translate_key(key, str(name.value))
            yield from _replace(name, lambda _, new=new: new)  # type: ignore[misc]
            yield from _mapping_edits(entry, f"{key}.{new}" if key else new)


def _unit_edits(node: yaml.Node) -> Iterator[_Edit]:
    """Yield the edits of a technique or a merge step, in the short form or with the keys ``name`` and ``settings``."""
    if isinstance(node, yaml.ScalarNode):
        yield from _replace(node, _rename_unit)
    if not isinstance(node, yaml.MappingNode):
        return
    entries = {str(name.value): entry for name, entry in node.value}
    if "name" in entries:
        yield from _replace(entries["name"], _rename_unit)
        yield from _setting_edits(entries.get("settings"), _rename_unit(str(entries["name"].value)), ())
        return
    for name, entry in node.value:
        yield from _replace(name, _rename_unit)
        yield from _setting_edits(entry, _rename_unit(str(name.value)), ())


def _setting_edits(node: yaml.Node | None, unit: str, above: tuple[str, ...]) -> Iterator[_Edit]:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, entry in node.value:
        if _merges(name):
            yield from _setting_edits(entry, unit, above)
            continue
        path = (*above, str(name.value))
        yield from _replace(name, lambda _, path=path: translate_unit_setting(unit, path, "")[0])  # type: ignore[misc]
        yield from _replace(entry, lambda value, path=path: translate_unit_setting(unit, path, value)[1])  # type: ignore[misc]
        yield from _setting_edits(entry, unit, path)


def _rename_unit(name: str) -> str:
    return UNIT_NAMES.get(name, name)


def _merges(key: yaml.Node) -> bool:
    return bool(key.tag == "tag:yaml.org,2002:merge")


def _replace(node: yaml.Node, rename: Callable[[str], str]) -> Iterator[_Edit]:
    """Yield the edit that replaces the text of a scalar and keeps its quotes; nothing if it does not change."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        return
    new = rename(node.value)
    if new != node.value and node.style in (None, "'", '"'):
        quote = node.style or ""
        yield _Edit(node.start_mark.index, node.end_mark.index, f"{quote}{new}{quote}")
