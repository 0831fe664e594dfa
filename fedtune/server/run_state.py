"""What a server keeps from round to round besides the shared state, such as the moments of a server optimiser.

It lies in the server's memory, among what it remembers of earlier tasks, and is written beside every checkpoint.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

__all__ = ["Part", "join_memory", "name_run_state", "select_run_state", "select_task_memory"]

Part = Literal["merge", "reference", "algorithm"]
"""What it is of: the last step of the merge, the step that combines updates, or ``federation.algorithm``."""
Tensors = Mapping[str, Tensor]
_PREFIX = "run:"


def name_run_state(part: Part, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors under the names that they have in the server's memory."""
    return {f"{_PREFIX}{part}/{name}": tensor for name, tensor in tensors.items()}


def select_run_state(memory: Tensors, part: Part) -> dict[str, Tensor]:
    """Undo ``name_run_state``."""
    prefix = f"{_PREFIX}{part}/"
    return {name.removeprefix(prefix): memory[name] for name in memory if name.startswith(prefix)}


def select_task_memory(memory: Tensors) -> dict[str, Tensor]:
    """Return what the server remembers of earlier tasks."""
    return {name: memory[name] for name in memory if not name.startswith(_PREFIX)}


def join_memory(before: Tensors, after_task: Tensors | None, run_state: Tensors | None) -> dict[str, Tensor] | None:
    """Return the server's whole memory after a round; None if it is not to be written.

    ``after_task`` and ``run_state`` are the new parts, None where a part stays. A run that has any run state writes the
    memory in every round, because the checkpoints of earlier rounds may be pruned.
    """
    tasks = select_task_memory(before) if after_task is None else after_task
    kept = {name: before[name] for name in before if name.startswith(_PREFIX)} if run_state is None else run_state
    return {**tasks, **kept} if kept or after_task is not None else None
