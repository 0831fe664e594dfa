"""Partitions of other packages: entry points in the group ``fedtune.partitions``, each a subclass of ``Partition``."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import ValidationError

from fedtune.errors import DataError, RecipeError
from fedtune.recipe.plug_in_partition import PARTITIONS, PlugInPartition
from fedtune.recipe.plug_ins import find_plug_in
from fedtune.recipe.schema import Dirichlet, EqualDirichlet, Iid, Natural, Recipe, Shards, Size
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.recipe.validation_errors import explain_validation_error

__all__ = ["Partition", "assign_groups", "build_partition", "check_partition"]

IntArray = NDArray[np.int64]
_BUILT_IN = {kind.model_fields["kind"].default for kind in (Dirichlet, EqualDirichlet, Iid, Natural, Shards, Size)}
_WHERE = "data.partition"


class Partition(NamedUnit, ABC):
    """A way to share groups of examples over clients. Its fields are its settings, beside ``kind``."""

    @abstractmethod
    def assign(self, labels: IntArray | None, sizes: IntArray, num_clients: int, random: Generator) -> IntArray:
        """The client 0, 1, ... of each group.

        ``labels`` [groups] are the most frequent class numbers, None for examples without classes; ``sizes`` [groups]
        are numbers of examples. Draw from ``random`` alone.
        """


def check_partition(recipe: Recipe) -> None:
    """RecipeError for a partition of a package that does not fit, or has wrong settings."""
    if isinstance(recipe.data.partition, PlugInPartition):
        build_partition(recipe.data.partition)


def build_partition(settings: PlugInPartition) -> Partition:
    """The partition that a recipe names, with its settings."""
    name = settings.kind
    plug_in = find_plug_in(PARTITIONS, name, _WHERE, __name__ if name in _BUILT_IN else None)
    if plug_in is None:
        raise RecipeError(f"{_WHERE}: there is no {name!r}; install the package that publishes it")
    found = plug_in.load(_WHERE)
    if not isinstance(found, type) or not issubclass(found, Partition) or getattr(found, "name", None) != name:
        raise RecipeError(
            f"{_WHERE}: {name} of the package {plug_in.package} is no Partition of that name; update or uninstall "
            f"{plug_in.package}"
        )
    try:
        return found.model_validate(settings.settings)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, found, f"{_WHERE}, {name}")) from error


def assign_groups(
    settings: PlugInPartition, labels: IntArray | None, sizes: IntArray, num_clients: int, random: Generator
) -> IntArray:
    """The client of each group; DataError if the partition gives something else."""
    given = build_partition(settings).assign(labels, sizes, num_clients, random)
    owner = np.asarray(given)
    fits = owner.shape == sizes.shape and owner.dtype.kind in "iu"
    if not fits or owner.min() < 0 or owner.max() >= num_clients:
        raise DataError(
            f"{_WHERE}: {settings.kind} must give a client from 0 to {num_clients - 1} for each of the {len(sizes)} "
            "groups; update the package that publishes it"
        )
    return owner.astype(np.int64)
