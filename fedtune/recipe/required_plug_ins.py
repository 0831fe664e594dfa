"""The plug-ins that a recipe needs on a device, with the packages that publish them.

A device that lacks a plug-in cannot tell which package publishes it, so the server sends the names. Sources of data are
left out, because devices bring their own data.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fedtune.errors import RecipeError
from fedtune.recipe.plug_in_partition import PARTITIONS, PlugInPartition
from fedtune.recipe.plug_ins import find_plug_ins
from fedtune.recipe.schema import Recipe

__all__ = [
    "RequiredPlugIn",
    "decode_plug_ins",
    "describe_plug_ins",
    "encode_plug_ins",
    "list_required_plug_ins",
    "require_plug_ins",
]


_METRICS, _MODEL_SOURCES = "fedtune.metrics", "fedtune.model_sources"
_CODES: Mapping[str, str] = {_METRICS: "metric-unavailable", _MODEL_SOURCES: "source-unreadable"}
"""What a device that lacks a plug-in of a group tells the server; of other groups ``unit-unavailable``."""


class RequiredPlugIn(NamedTuple):
    """A name in a group of entry points, and the package that publishes it."""

    group: str
    name: str
    package: str


def list_required_plug_ins(recipe: Recipe) -> tuple[RequiredPlugIn, ...]:
    """Return what other packages publish of all that the recipe names."""
    return tuple(
        RequiredPlugIn(group, name, found[0].package)
        for group, name in dict.fromkeys(_list_names(recipe))
        if (found := find_plug_ins(group).get(name))
    )


def _list_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each name in a recipe that a package may publish, with its group."""
    yield "fedtune.tasks", recipe.task.name
    for units in (recipe.train.techniques, *(device.techniques or [] for device in recipe.devices)):
        yield from (("fedtune.techniques", unit.name) for unit in units)
    yield from (("fedtune.merging", unit.name) for unit in recipe.merge)
    if recipe.federation.algorithm is not None:
        yield "fedtune.algorithms", recipe.federation.algorithm.name
    if recipe.wire is not None:
        yield from (("fedtune.wire.codecs", unit.name) for unit in (*recipe.wire.up, *recipe.wire.down))
    if recipe.stream is not None:
        yield from (("fedtune.continual", unit.name) for unit in recipe.stream.memory)
    yield _MODEL_SOURCES, recipe.model.source.partition(":")[0]
    if isinstance(recipe.data.partition, PlugInPartition):
        yield PARTITIONS, recipe.data.partition.kind
    if recipe.evaluation.local_holdout:  # otherwise only the server computes metrics
        yield from ((_METRICS, name) for name in recipe.evaluation.metrics)


def encode_plug_ins(required: Sequence[RequiredPlugIn]) -> str | None:
    """Return them as the text of a train request; None if there are none."""
    return json.dumps(required) if required else None


def decode_plug_ins(text: str | None) -> tuple[RequiredPlugIn, ...]:
    """Return the plug-ins in the text of a train request."""
    return tuple(RequiredPlugIn(*map(str, fields)) for fields in json.loads(text)) if text else ()


def require_plug_ins(required: Iterable[RequiredPlugIn]) -> None:
    """Raise RecipeError for the first plug-in that is not installed here; the message names its package."""
    for group, name, package in required:
        if name not in find_plug_ins(group):
            raise RecipeError(
                f"the recipe names {name!r}, which the package {package} publishes in {group}, but {package} is not "
                f"installed here; install {package}",
                code=_CODES.get(group, "unit-unavailable"),
            )


def describe_plug_ins(required: Iterable[RequiredPlugIn]) -> str:
    """Return names and packages in words: ``last-layer of the package half-tuned``."""
    return ", ".join(f"{name} of the package {package}" for _, name, package in required)
