"""What a server remembers of earlier tasks: tensors in a file beside the checkpoint of the round that ended a task.

The file is written before the round is committed, and the store has its digest. A resumed run reads the newest one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtune import checkpoint, continual, paths
from fedtune.server.algorithm_merge import list_sent_algorithm_memory
from fedtune.server.class_payloads import list_trainable_tensors
from fedtune.server.drift_reference import list_sent_reference
from fedtune.server.run_state import select_run_state
from fedtune.tracking import RoundRecord
from fedtune.training import RunContext

__all__ = ["TaskMemory", "list_sent_memory", "read_newest_memory"]

Tensors = Mapping[str, Tensor]


@dataclass
class TaskMemory:
    """The tensors that the continual methods of a run keep on the server, after its last committed round."""

    tensors: Tensors


def read_newest_memory(done: Sequence[RoundRecord]) -> dict[str, Tensor]:
    """Return the memory after the committed rounds, and verify its digest; empty before the first task has ended."""
    for record in reversed(done):
        if record.checkpoint is not None and record.checkpoint.memory_sha256 is not None:
            path = checkpoint.get_memory_path(paths.get_runs_folder() / record.checkpoint.path)
            return checkpoint.read_checkpoint(path, record.checkpoint.memory_sha256)
    return {}


def list_sent_memory(context: RunContext, memory: Tensors, round_number: int) -> dict[str, Tensor]:
    """Return the memory that clients receive in a round, named by its method or algorithm."""
    own = select_run_state(memory, "algorithm")
    found = list_sent_algorithm_memory(context, own, list_trainable_tensors(context, round_number)) if own else {}
    plan = context.stream_plan
    if plan is None or not memory:
        return found
    found |= list_sent_reference(memory)
    places = (plan.find_place(round_number, client) for client in range(context.recipe.num_clients))
    place = next((place for place in places if place is not None), None)
    if place is None:
        return found
    for method in context.methods:
        own = continual.select_memory(method, memory)
        found |= continual.name_memory(method, {name: own[name] for name in method.list_sent_memory(own, place)})
    return found
