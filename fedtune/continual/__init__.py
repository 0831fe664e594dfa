"""Continual learning: tasks arrive one after another, and methods keep what was learned. Each method is one file."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune.continual._border_methods import build_border_methods, write_out_border_methods
from fedtune.continual._drift_checks import check_drift
from fedtune.continual._drift_features import check_features_stay, find_last_layer
from fedtune.continual._drift_opening import end_visit
from fedtune.continual._fisher_sums import require_gradients
from fedtune.continual._masked_head import find_head, list_classes, mask_classes
from fedtune.continual._method import Border, BorderResult, ContinualMethod, MethodRound, MethodSetup, TaskUpload
from fedtune.continual._plan import Place, StreamPlan, find_stream
from fedtune.continual._storage import check_storage, find_storage_budget
from fedtune.continual._stream_rows import (
    list_tasks,
    number_tasks,
    partition_stream,
    read_stream_values,
    select_place_rows,
)
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import build_unit

__all__ = [
    "Border",
    "BorderResult",
    "ContinualMethod",
    "MethodRound",
    "MethodSetup",
    "Place",
    "StreamPlan",
    "TaskUpload",
    "build_border_methods",
    "build_methods",
    "check_features_stay",
    "check_stream",
    "end_visit",
    "find_head",
    "find_last_layer",
    "find_storage_budget",
    "find_stream",
    "list_classes",
    "list_methods",
    "list_tasks",
    "mask_classes",
    "name_memory",
    "number_tasks",
    "partition_stream",
    "read_stream_values",
    "require_gradients",
    "select_memory",
    "select_place_rows",
    "write_out_border_methods",
]


def build_methods(units: Sequence[Unit], recipe_key: str = "stream.memory") -> tuple[ContinualMethod, ...]:
    """Return the methods that a recipe names, in order; RecipeError for wrong settings or a method named twice."""
    chosen: tuple[ContinualMethod, ...] = tuple(build_unit(__name__, unit, recipe_key) for unit in units)
    names = [method.name for method in chosen]
    if len(set(names)) < len(names):
        raise RecipeError(f"{recipe_key}: {', '.join(names)} names one method twice; drop one")
    misplaced = [method.name for method in chosen if method.consolidates]
    if misplaced:
        raise RecipeError(f"{recipe_key}: {misplaced[0]} merges at the end of a task; list it in stream.consolidate")
    if "joint" in names and len(names) > 1:
        raise RecipeError(f"{recipe_key}: joint has all examples, so nothing is left to remember; drop the others")
    return chosen


def list_methods(recipe: Recipe) -> tuple[ContinualMethod, ...]:
    """Return the methods of a recipe's stream, none without a stream.

    Those that merge at the end of a task come first, so that the others see the result.
    """
    if recipe.stream is None:
        return ()
    remembering, merging = build_methods(recipe.stream.memory), build_border_methods(recipe.stream.consolidate)
    if merging and any(method.uses_all_tasks for method in remembering):
        raise RecipeError("stream.consolidate: joint trains on all tasks, so nothing is left to merge; drop one")
    return (*merging, *remembering)


def name_memory(method: ContinualMethod, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a method's tensors under names that belong to it."""
    return {f"{method.name}/{name}": tensor for name, tensor in tensors.items()}


def select_memory(method: ContinualMethod, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``name_memory``: return the tensors of one method among those of all."""
    prefix = f"{method.name}/"
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def check_stream(recipe: Recipe) -> None:
    """Raise RecipeError if the methods of a stream cannot do what the rest of the recipe asks."""
    if recipe.stream is None:
        return
    check_drift(recipe)
    methods = list_methods(recipe)
    check_storage(recipe, methods)
    for method in methods:
        key = "stream.consolidate" if method.consolidates else "stream.memory"
        if method.needs_common_border and recipe.stream.arrival != "together":
            raise RecipeError(
                f"{key}: {method.label} needs all clients to end a task in the same round; set arrival: together"
            )
        if method.uploads_statistics and recipe.privacy is not None:
            raise RecipeError(
                f"{key}: {method.label} sends statistics that privacy neither clips nor noises; drop one of them"
            )
        method.check(recipe)
