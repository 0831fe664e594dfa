"""The search field of the page of runs: words, and settings as ``federation.rounds:16``."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import RunRecord

__all__ = ["list_settings", "matches_search"]


def matches_search(run: RunRecord, search: str) -> bool:
    """Return whether a run has every word of a search, whatever its case.

    A word is looked for in the id, the name, the engine and the reason. ``key:value`` is looked for in the recipe: the
    end of a dotted key, and the beginning of its value.
    """
    text = " ".join((run.id, run.name, run.engine, run.reason)).lower()
    words = search.lower().split()
    plain = all(word in text for word in words if ":" not in word)
    return plain and all(word in text or _has_setting(run, word) for word in words if ":" in word)


def list_settings(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every setting in a recipe; members of lists have their index."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from list_settings(child, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from list_settings(child, f"{at}.{index}")
    else:
        yield at, value


def _has_setting(run: RunRecord, word: str) -> bool:
    key, _, value = word.partition(":")
    return any(
        f".{name}".lower().endswith(f".{key}") and str(found).lower().startswith(value)
        for name, found in list_settings(read_stored_recipe(run.recipe))
    )
