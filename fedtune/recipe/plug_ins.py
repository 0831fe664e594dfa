"""What other installed packages publish: entry points, found without importing any of them.

A package names its units in groups of its ``pyproject.toml``: ``fedtune.techniques``, ``fedtune.merging``,
``fedtune.tasks``, ``fedtune.continual``, ``fedtune.algorithms``, ``fedtune.attacks``, ``fedtune.metrics``,
``fedtune.callbacks``, ``fedtune.data_sources``, ``fedtune.model_sources`` and ``fedtune.partitions``. The name of an
entry point is what recipes call it.
"""

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from fedtune.errors import RecipeError

__all__ = ["PlugIn", "find_plug_in", "find_plug_ins"]


class PlugIn(NamedTuple):
    """Something that an installed package publishes under a name."""

    name: str
    package: str
    entry_point: EntryPoint

    def load(self, where: str, code: str = "unit-unavailable") -> Any:
        """What the entry point names; RecipeError names the package and the reason if it cannot be imported."""
        try:
            return self.entry_point.load()
        except Exception as error:  # a module may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecipeError(
                f"{where}: {self.name} is published by the package {self.package}, which cannot be imported "
                f"({reason}); update or uninstall {self.package}",
                code=code,
            ) from error


def find_plug_ins(group: str) -> Mapping[str, tuple[PlugIn, ...]]:
    """All plug-ins of a group by name. A name has several if several packages publish it."""
    return _read_entry_points(group, tuple(sys.path))


def find_plug_in(group: str, name: str, where: str, built_in: str | None = None) -> PlugIn | None:
    """The plug-in of that name, if there is one; RecipeError if two packages, or one and fedtune, publish the name.

    ``built_in`` is the module of fedtune that publishes it.
    """
    found = find_plug_ins(group).get(name, ())
    publishers = [*([] if built_in is None else ["fedtune"]), *(one.package for one in found)]
    if len(publishers) > 1:
        raise RecipeError(
            f"{where}: {publishers[0]} and the package {publishers[1]} both publish {name!r}; uninstall "
            f"{publishers[1]}, or rename it there",
            code="unit-unavailable",
        )
    return found[0] if found else None


@lru_cache(maxsize=32)
def _read_entry_points(
    group: str,
    path: tuple[str, ...],  # noqa: ARG001 - a key of the cache
) -> Mapping[str, tuple[PlugIn, ...]]:
    """``path`` is the import path: packages on another one are others."""
    found: dict[str, tuple[PlugIn, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda one: (one.name, _get_package(one))):
        found[point.name] = (*found.get(point.name, ()), PlugIn(point.name, _get_package(point), point))
    return found


def _get_package(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else point.dist.name
