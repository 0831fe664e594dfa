"""The delta of the server that a merge compares updates with: of its own examples, or of its last merge."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune.merging import CombineStep
from fedtune.server.run_state import select_run_state
from fedtune.server.server_run import ServerRun

__all__ = ["find_next_reference", "find_reference"]

Tensors = Mapping[str, Tensor]


def find_reference(run: ServerRun, combine: CombineStep, state: Tensors, round_number: int) -> dict[str, Tensor]:
    """Return the delta that the step compares models with, dense; empty for other steps and before the first merge."""
    if combine.reference == "root data":
        assert run.root_data is not None
        return run.root_data.train_update(state, round_number)
    return select_run_state(run.memory.tensors, "reference")


def find_next_reference(
    combine: CombineStep, earlier: Tensors, names: Sequence[str], before: Tensors, after: Tensors
) -> dict[str, Tensor]:
    """Return the delta that the next round's merge compares with, dense: that of the merged tensors, and the earlier
    one of those that were not merged; empty for a step that does not ask for it.
    """
    if combine.reference != "last merge":
        return {}
    return {**earlier, **{name: after[name] - before[name] for name in names}}
