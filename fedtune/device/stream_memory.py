"""Read and write what continual methods keep on the device between the tasks of a stream."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedtune.continual import find_storage_budget
from fedtune.device.memory_key import find_memory_key
from fedtune.device.own_memory import MemoryFolder
from fedtune.recipe.schema import Recipe
from fedtune.training.stream_round import StreamRound
from fedtune.wire.client_update import TrainRequest

__all__ = ["add_stored_tensors", "count_stored_bytes", "write_stored_tensors"]


def add_stored_tensors(
    stream: StreamRound | None, recipe: Recipe, request: TrainRequest, folder: Path
) -> StreamRound | None:
    """Return the round with what the device stored in the newest earlier visit.

    Raise MemoryBudgetError if the disk has no room for what is to be stored, StoreError for a file that was changed.
    """
    if stream is None or not stream.methods:
        return stream
    memory = _open(recipe, request, folder)
    memory.require_disk_room()
    return replace(stream, stored=memory.read_earlier(stream.place.visit))


def write_stored_tensors(
    tensors: Mapping[str, Tensor], stream: StreamRound | None, recipe: Recipe, request: TrainRequest, folder: Path
) -> None:
    """Write the file of this visit, if the methods store anything."""
    if stream is None or not tensors:
        return
    memory = _open(recipe, request, folder)
    memory.write(stream.place.visit, tensors)
    assert recipe.stream is not None
    assert isinstance(recipe.stream.tasks, list)
    if stream.place.last and stream.place.visit == len(recipe.stream.tasks) - 1:
        memory.mark_ended()


def count_stored_bytes(stream: StreamRound | None, recipe: Recipe, request: TrainRequest, folder: Path) -> int | None:
    """Return the bytes of what the device stores for later visits; None without a stream."""
    return None if stream is None else _open(recipe, request, folder).count_bytes()


def _open(recipe: Recipe, request: TrainRequest, folder: Path) -> MemoryFolder:
    assert recipe.stream is not None
    key = find_memory_key(folder) if recipe.stream.own_memory.encrypted else None
    budget = find_storage_budget(recipe, recipe.get_device_class(request.client))
    return MemoryFolder(folder, request.run_id, budget, key)
