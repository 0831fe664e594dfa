"""Applies a server optimiser to the merged change of each tensor, some rows at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.merging._step import ServerOptimiserStep
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["take_server_step"]

Tensors = Mapping[str, Tensor]
_STATISTICS = (".running_mean", ".running_var")


def take_server_step(
    step: ServerOptimiserStep, before: Tensors, merged: Tensors, names: Iterable[str], moments: Tensors
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the next state and the next moments; ``names`` are the tensors that were trained in this round.

    All others keep their value and their moments. Running statistics of batch norms are not weights: they stay as they
    were merged. Steps are computed in double precision, and both results are fp32.
    """
    after, kept = dict(merged), dict(moments)
    for name in names:
        if name.endswith(_STATISTICS) or not before[name].is_floating_point():
            continue
        own = {kind: _get_moment(step, kind, name, moments, before[name]) for kind in step.initial_moments}
        after[name], changed = _step_tensor(step, before[name], merged[name], own)
        kept |= {_name_moment(step, kind, name): tensor for kind, tensor in changed.items()}
    return after, kept


def _name_moment(step: ServerOptimiserStep, kind: str, name: str) -> str:
    return f"{step.name}/{kind}/{name}"


def _get_moment(step: ServerOptimiserStep, kind: str, name: str, moments: Tensors, like: Tensor) -> Tensor:
    found = moments.get(_name_moment(step, kind, name))
    return torch.full_like(like, step.initial_moments[kind]) if found is None else found


def _step_tensor(
    step: ServerOptimiserStep, before: Tensor, merged: Tensor, moments: Tensors
) -> tuple[Tensor, dict[str, Tensor]]:
    after, changed = torch.empty_like(before), {kind: torch.empty_like(one) for kind, one in moments.items()}
    for start, stop in iter_row_chunks(tuple(before.shape)):
        base = _get_rows(before, start, stop).double()
        own = {kind: _get_rows(one, start, stop).double() for kind, one in moments.items()}
        move, found = step.compute_step(_get_rows(merged, start, stop).double() - base, own)
        _get_rows(after, start, stop).copy_(base + move)
        for kind, one in found.items():
            _get_rows(changed[kind], start, stop).copy_(one)
    return after, changed


def _get_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A view of some rows; a tensor without dimensions is one row."""
    return tensor[start:stop] if tensor.dim() else tensor.unsqueeze(0)
