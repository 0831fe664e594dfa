"""Read and write what the recipe's algorithm keeps on the device from round to round.

A round reads what was written in the client's last round whose update the server merged, as the train request says. So
device and server count the same updates, also when some were lost, and a round that is begun again finds what it found
the first time. A client that lost it would bias all later rounds, and is refused.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedtune import algorithms
from fedtune.device.memory_key import find_memory_key
from fedtune.device.own_memory import ALGORITHM_PREFIX, MemoryFolder
from fedtune.errors import StoreError
from fedtune.recipe.schema import Recipe
from fedtune.training.algorithm_inputs import AlgorithmInputs
from fedtune.wire.client_update import TrainRequest

__all__ = ["read_algorithm_inputs", "write_algorithm_memory"]


def read_algorithm_inputs(
    recipe: Recipe, request: TrainRequest, received: Mapping[str, Tensor], folder: Path
) -> AlgorithmInputs | None:
    """Return the round's algorithm with its tensors, None without one.

    Raise StoreError for a file that was changed or is missing.
    """
    algorithm = algorithms.find_algorithm(recipe)
    if algorithm is None:
        return None
    own = algorithms.select_tensors(algorithm, received)
    merged = request.merged_round or 0
    if not algorithm.remembers or not merged:
        return AlgorithmInputs(algorithm, {}, own)
    stored = _open(recipe, request, folder).read_earlier(merged + 1)
    if algorithm.needs_one_start and merged not in stored:
        raise StoreError(
            f"client {request.client} lost what {algorithm.name} kept in round {merged}, and the server counts on it; "
            "start a new run, as after a rollback, or leave this client out",
            code="memory-lost",
        )
    return AlgorithmInputs(algorithm, next(iter(stored.values()), {}), own)


def write_algorithm_memory(tensors: Mapping[str, Tensor], recipe: Recipe, request: TrainRequest, folder: Path) -> None:
    """Write the file of this round, if the algorithm keeps anything."""
    if tensors:
        memory = _open(recipe, request, folder)
        memory.forget_unmerged(request.merged_round or 0, request.round)
        memory.write(request.round, tensors)


def _open(recipe: Recipe, request: TrainRequest, folder: Path) -> MemoryFolder:
    encrypted = recipe.stream is not None and recipe.stream.own_memory.encrypted
    return MemoryFolder(
        folder, request.run_id, key=find_memory_key(folder) if encrypted else None, prefix=ALGORITHM_PREFIX
    )
