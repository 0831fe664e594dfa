"""Translates recipes of version 1 to version 2 when they are read. Version 2 uses the terms of the field.

A file or a stored run without ``version`` has version 1. All differences are in the tables of
``fedtune.recipe.version_names``; other keys are the same in both. Old names of techniques, merge steps and their
settings stay as aliases in version 2.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.recipe.version_names import KEYS, NESTED_UNIT_KEYS, UNIT_KEYS, UNIT_LISTS, UNIT_NAMES, UNIT_VALUES, VALUES

__all__ = [
    "VERSION",
    "needs_translation",
    "read_stored_recipe",
    "translate_key",
    "translate_path",
    "translate_recipe",
    "translate_setting",
    "translate_unit",
    "translate_unit_setting",
    "translate_value",
]

VERSION = 2
Path = tuple[str | int, ...]


def needs_translation(value: object) -> bool:
    """Return whether a recipe has version 1: its version is 1 or missing."""
    return isinstance(value, Mapping) and value.get("version", 1) == 1


def translate_recipe(value: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a recipe of version 1 to the keys and values of version 2. Unknown keys are left for validation.

    If a key is given under both names, both are kept, so that validation refuses the old one.
    """
    translated: dict[str, Any] = _translate(value, "")
    return {"version": VERSION, **{key: found for key, found in translated.items() if key != "version"}}


def read_stored_recipe(text: str) -> dict[str, Any]:
    """Return a run's stored recipe as a mapping with the keys of version 2."""
    value: dict[str, Any] = json.loads(text)
    return translate_recipe(value) if needs_translation(value) else value


def translate_path(path: Path) -> Path:
    """Translate the path of a key to version 2. List indices do not change."""
    found: Path = ()
    for part in path:
        found = (*found, part if isinstance(part, int) else translate_key(_dotted(found), part))
    return found


def translate_setting(path: Path, value: Any) -> tuple[Path, Any]:
    """Translate a setting's path and value to version 2. Those of version 2 do not change."""
    translated = translate_path(path)
    return translated, _translate(value, _dotted(translated))


def translate_key(parent: str, name: str) -> str:
    """Return the name in version 2 of a key below ``parent``, a key of version 2 without indices."""
    return _RENAMED.get(_below(parent, name), name)


def translate_value(key: str, value: Any) -> Any:
    """Return the value in version 2 of a scalar setting; ``key`` is a key of version 2."""
    if not isinstance(value, str):
        return value
    if key in UNIT_LISTS:
        return "+".join(UNIT_NAMES.get(name, name) for name in value.split("+"))
    return _REVALUED.get(key, {}).get(value, value)


def _translate(value: Any, key: str) -> Any:
    if key in UNIT_LISTS and isinstance(value, list):
        return [translate_unit(unit) for unit in value]
    if isinstance(value, Mapping):
        return dict(_translated_entries(value, key))
    if isinstance(value, list):
        return [_translate(entry, key) for entry in value]
    return translate_value(key, value)


def _translated_entries(value: Mapping[Any, Any], key: str) -> Iterator[tuple[Any, Any]]:
    for name, entry in value.items():
        new = translate_key(key, name) if isinstance(name, str) else name
        yield (name if new != name and new in value else new), _translate(entry, _below(key, new))


def _below(parent: str, name: object) -> str:
    return f"{parent}.{name}" if parent else str(name)


def _dotted(path: Path) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def _translated_key(key: str) -> str:
    """Translate a full key of version 1 to version 2."""
    parent, _, name = key.rpartition(".")
    return _below(_translated_key(parent), KEYS.get(key, name)) if parent else KEYS.get(key, name)


_RENAMED = {_below(_translated_key(key.rpartition(".")[0]), key.rpartition(".")[2]): name for key, name in KEYS.items()}
"""``KEYS`` with the parent's name of version 2, so that a recipe may mix the names of both versions."""
_REVALUED = {_translated_key(key): values for key, values in VALUES.items()}


def translate_unit(unit: Any) -> Any:
    """Translate a technique or a merge step: its name, and the names and values of its settings."""
    if isinstance(unit, str):
        return UNIT_NAMES.get(unit, unit)
    if not isinstance(unit, Mapping):
        return unit
    if "name" in unit:
        name = _unit_name(unit["name"])
        return {**unit, "name": name, **_settings_entry(name, unit.get("settings"))}
    return {_unit_name(name): _unit_settings(_unit_name(name), entry) for name, entry in unit.items()}


def translate_unit_setting(unit: str, path: tuple[str, ...], value: Any) -> tuple[str, Any]:
    """Return the current name and value of a unit's setting.

    ``path`` leads to it from the unit's settings, in old names.
    """
    *above, name = path
    if above:
        return NESTED_UNIT_KEYS.get((unit, above[0]), {}).get(name, name), value
    values = UNIT_VALUES.get(unit, {}).get(name, {})
    return UNIT_KEYS.get(unit, {}).get(name, name), values.get(value, value) if isinstance(value, str) else value


def _unit_name(name: Any) -> Any:
    return UNIT_NAMES.get(name, name) if isinstance(name, str) else name


def _settings_entry(name: Any, settings: Any) -> dict[str, Any]:
    return {} if settings is None else {"settings": _unit_settings(name, settings)}


def _unit_settings(unit: Any, settings: Any) -> Any:
    if not isinstance(settings, Mapping) or not isinstance(unit, str):
        return settings
    found = {}
    for name, entry in settings.items():
        new, value = translate_unit_setting(unit, (name,), entry)
        if isinstance(value, Mapping):
            value = {translate_unit_setting(unit, (name, inner), each)[0]: each for inner, each in value.items()}
        found[name if new != name and new in settings else new] = value
    return found
