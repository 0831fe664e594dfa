"""The reference of the drift signal on the server: sums of what clients sent, in double precision, over all tasks.

It lies in the server's memory of earlier tasks, and travels with each train request in single precision. Only energies
keep double precision, because they may hardly vary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.continual import StreamPlan
from fedtune.continual._drift_phases import DRIFT_PREFIX, find_phase
from fedtune.training import RunContext
from fedtune.training.drift_upload import declare_drift_upload
from fedtune.wire.client_update import ClientUpdate

__all__ = ["add_scores", "list_reference_rounds", "list_sent_reference", "update_memory"]

Memory = Mapping[str, Tensor]


def update_memory(
    context: RunContext, round_number: int, memory: Memory, after_task: Memory | None, updates: Sequence[ClientUpdate]
) -> dict[str, Tensor] | None:
    """Return the server's whole memory after a round, None if it does not change.

    ``after_task`` is what the methods remember, in a round that ends a task. In a round that begins one, what the
    clients of ``updates`` sent is added to the reference. The memory is written there even if nothing came, because
    that of earlier tasks is pruned.
    """
    kept = _select(memory)
    plan = context.stream_plan
    watches = plan is not None and plan.stream.drift is not None
    begins = watches and plan is not None and find_phase(plan, round_number) == "reference"
    if after_task is None and not begins:
        return None
    methods = after_task if after_task is not None else {name: memory[name] for name in memory if name not in kept}
    if begins and updates:
        kept = add_tensors(kept, _read(context, round_number, updates))
    return {**methods, **kept} or None


def add_tensors(before: Memory, parts: Sequence[Memory]) -> dict[str, Tensor]:
    """Return the sums in double precision, added in order."""
    found = {name: tensor.double() for name, tensor in before.items()}
    for part in parts:
        for name, tensor in part.items():
            found[name] = found[name] + tensor.double() if name in found else tensor.double()
    return found


def add_scores(context: RunContext, round_number: int, updates: Sequence[ClientUpdate]) -> Tensor | None:
    """Return the counts of the scores that clients sent for the threshold; None in rounds without any."""
    plan = context.stream_plan
    if plan is None or plan.stream.drift is None or find_phase(plan, round_number) != "threshold" or not updates:
        return None
    parts = [part[f"{DRIFT_PREFIX}scores"] for part in _read(context, round_number, updates)]
    return torch.stack(parts).long().sum(0)


def list_sent_reference(memory: Memory) -> dict[str, Tensor]:
    """Return the reference as clients receive it; empty before there is one."""
    return {
        name: tensor if name == f"{DRIFT_PREFIX}energies" else tensor.float()
        for name, tensor in _select(memory).items()
    }


def list_reference_rounds(plan: StreamPlan) -> list[int]:
    """Return the rounds whose memory has a new reference."""
    if plan.stream.drift is None:
        return []
    return [number for number in range(1, plan.num_rounds + 1) if find_phase(plan, number) == "reference"]


def _read(context: RunContext, round_number: int, updates: Sequence[ClientUpdate]) -> list[dict[str, Tensor]]:
    names = list(declare_drift_upload(context, round_number))
    return [one.read_tensors(names) for one in sorted(updates, key=lambda one: one.client)]


def _select(memory: Memory) -> dict[str, Tensor]:
    return {name: memory[name] for name in memory if name.startswith(DRIFT_PREFIX)}
