"""How results come together: the shared state plus one merged delta, tensor by tensor and piece by piece."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedtune.contribution import Contribution, pieces
from fedtune.errors import RecipeError
from fedtune.merging._statistics import spread
from fedtune.merging._step import Combine
from fedtune.recipe import Unit
from fedtune.registry import build

__all__ = ["choose", "merge"]

_MEAN, _VARIANCE = ".running_mean", ".running_var"


def choose(units: Sequence[Unit]) -> Combine:
    """The merge a recipe names; RecipeError unless exactly one step combines."""
    steps = [build("fedtune.merging", unit, "merge") for unit in units]
    if len(steps) != 1:
        raise RecipeError(f"merge: {len(steps)} steps combine, but exactly one may; keep one of them")
    combine: Combine = steps[0]
    return combine


def merge(
    step: Combine, state: Mapping[str, Tensor], names: Iterable[str], contributions: Sequence[Contribution]
) -> dict[str, Tensor]:
    """The next shared state: ``state`` with the merged delta added to the named tensors.

    Contributions are taken in client order, so the bits do not depend on who answered first.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.client)
    weights = step.weights([contribution.examples for contribution in ordered])
    merged = dict(state)
    for name in names:
        merged[name] = _merge_one(step, state[name], name, weights, ordered)
        if name.endswith(_VARIANCE):
            merged[name] += spread(weights, _whole(ordered, name.removesuffix(_VARIANCE) + _MEAN, state[name]))
    return merged


def _whole(ordered: Sequence[Contribution], name: str, like: Tensor) -> list[Tensor]:
    return [contribution.rows(name, 0, len(like)) for contribution in ordered]


def _merge_one(
    step: Combine, before: Tensor, name: str, weights: Sequence[float], ordered: Sequence[Contribution]
) -> Tensor:
    after = before.clone()
    rows = after if after.dim() else after.unsqueeze(0)
    for start, stop in pieces(before.shape):
        deltas = (contribution.rows(name, start, stop) for contribution in ordered)
        rows[start:stop] += step.combine(weights, deltas).reshape(rows[start:stop].shape)
    return after
