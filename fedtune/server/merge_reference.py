"""The delta of the server that a merge compares updates with, and what the server remembers of its last merge.

The last merge lies in the server's memory beside the checkpoint. It is written in every round, also in a failed one,
because the memory of earlier rounds is pruned.
"""

from collections.abc import Mapping

from torch import Tensor

from fedtune.merging import CombineStep, build_pipeline
from fedtune.server.class_payloads import list_trainable_tensors
from fedtune.server.server_run import ServerRun
from fedtune.training.stream_place import trains_in_round

__all__ = ["find_reference", "remember_merge"]

_PREFIX = "last-merge/"
Tensors = Mapping[str, Tensor]


def find_reference(run: ServerRun, combine: CombineStep, state: Tensors, round_number: int) -> dict[str, Tensor]:
    """Return the delta that the step compares models with, dense; empty for other steps and before the first merge."""
    if combine.reference == "root data":
        assert run.root_data is not None
        return run.root_data.train_update(state, round_number)
    if combine.reference == "last merge":
        return {name.removeprefix(_PREFIX): one for name, one in run.memory.tensors.items() if _is_merge(name)}
    return {}


def remember_merge(
    run: ServerRun, round_number: int, next_memory: dict[str, Tensor] | None, before: Tensors, after: Tensors
) -> dict[str, Tensor] | None:
    """Return the server's whole memory after a round with the delta of its merge, or of the last one if it failed.

    ``next_memory`` is the memory without it, None if that does not change. The states are those before and after the
    merge, the same object if it failed.
    """
    if build_pipeline(run.context.recipe.merge).combine.reference != "last merge":
        return next_memory
    memory = run.memory.tensors
    others = memory if next_memory is None else next_memory
    found = {name: one for name, one in others.items() if not _is_merge(name)}
    found |= {name: one for name, one in memory.items() if _is_merge(name)}
    if after is not before and trains_in_round(run.context, round_number):
        names = list_trainable_tensors(run.context, round_number)
        found |= {f"{_PREFIX}{name}": after[name] - before[name] for name in names}
    return found or None


def _is_merge(name: str) -> bool:
    return name.startswith(_PREFIX)
