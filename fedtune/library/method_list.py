"""All methods that a recipe or a command can name: techniques, merge steps, tasks and more, and what packages add."""

import inspect
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fedtune.errors import RecipeError
from fedtune.recipe.plug_ins import find_plug_in, find_plug_ins
from fedtune.recipe.unit_registry import describe_unit_settings, find_unit_package, list_unit_names, read_unit_card

__all__ = ["UNIT_ROOMS", "Method", "describe_method", "list_methods"]

UNIT_ROOMS: Mapping[str, str] = {
    "technique": "fedtune.techniques",
    "merge": "fedtune.merging",
    "task": "fedtune.tasks",
    "continual": "fedtune.continual",
    "algorithm": "fedtune.algorithms",
    "attack": "fedtune.attacks",
    "codec": "fedtune.wire.codecs",
}
"""The package of each kind of unit, which is also the group of its entry points."""
_OTHER_GROUPS: Mapping[str, str] = {
    "metric": "fedtune.metrics",
    "callback": "fedtune.callbacks",
    "data source": "fedtune.data_sources",
    "model source": "fedtune.model_sources",
    "partition": "fedtune.partitions",
}
"""Groups of functions that packages publish; they have no settings."""


class Method(NamedTuple):
    """A method, its card and its settings. ``problem`` says why it cannot be used."""

    name: str
    kind: str
    package: str
    card: str
    settings: list[str]
    problem: str | None = None

    @property
    def summary(self) -> str:
        """The first line of the card, without the name in front."""
        first = (self.problem or self.card).strip().partition("\n")[0]
        return first if self.problem else first.partition(": ")[2] or first


def list_methods() -> list[tuple[str, str]]:
    """Kind and name of every method; no unit is imported."""
    units = [(kind, name) for kind, package in UNIT_ROOMS.items() for name in list_unit_names(package)]
    return units + [(kind, name) for kind, group in _OTHER_GROUPS.items() for name in find_plug_ins(group)]


def describe_method(kind: str, name: str) -> Method:
    """A method with its card. One that cannot be imported has the reason in place of a card."""
    try:
        if kind in UNIT_ROOMS:
            package = UNIT_ROOMS[kind]
            card, settings = read_unit_card(package, name), describe_unit_settings(package, name)
            return Method(name, kind, find_unit_package(package, name), card, settings)
        plug_in = find_plug_in(_OTHER_GROUPS[kind], name, kind)
        assert plug_in is not None
        return Method(name, kind, plug_in.package, inspect.getdoc(plug_in.load(kind)) or "", [])
    except RecipeError as error:
        return Method(name, kind, ", ".join(_list_publishers(kind, name)), "", [], str(error))


def _list_publishers(kind: str, name: str) -> Iterator[str]:
    for plug_in in find_plug_ins({**UNIT_ROOMS, **_OTHER_GROUPS}[kind]).get(name, ()):
        yield plug_in.package
