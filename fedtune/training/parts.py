"""Device classes with settings of their own: the shared model their own way, a part of what is shared to train.

All of the shared state must have its place in each class's model, or that model would be another function; low-rank
pairs may be cut to a smaller rank. What a class trains must be shared, and of each pair it trains the same factors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune import merging, techniques
from fedtune.contribution import Pair
from fedtune.errors import RecipeError
from fedtune.training.state import shapes

if TYPE_CHECKING:
    from fedtune.training.workshop import Workshop

__all__ = ["check_part", "received", "trained_in"]

_ROUNDS = (1, 2)
"""Techniques that alternate do so from one round to the next."""


def trained_in(shop: "Workshop", number: int) -> list[str]:
    """Names of the tensors that a workshop's clients train in a round."""
    techniques.begin_round(shop.techniques, shop.model, number)
    return techniques.trained(shop.model)


def received(shop: "Workshop", part: "Workshop") -> dict[str, tuple[int, ...]]:
    """What a class is sent of the shared state: its own shapes, by name."""
    own = shapes(part.model)
    return {name: own[name] for name in shop.shared if name in own}


def check_part(shop: "Workshop", part: "Workshop", device: str) -> None:
    """RecipeError unless a device class trains a part of the shared state on the model that all have."""
    start = f"devices: the techniques of {device}"
    mend = "give the class and train.techniques such as differ in how much they train"
    own = received(shop, part)
    if lacking := sorted(set(shop.shared) - own.keys()):
        raise RecipeError(f"{start} leave no place for {lacking[0]}, which train.techniques shares; {mend}")
    if beside := sorted({name for number in _ROUNDS for name in trained_in(part, number)} - own.keys()):
        raise RecipeError(f"{start} train {beside[0]}, which train.techniques does not share; {mend}")
    pairs = techniques.pairs(shop.techniques, shop.model)
    whole = shapes(shop.model)
    if unfit := [name for name in own if not _fits(own[name], whole[name], name in _factors(pairs))]:
        raise RecipeError(
            f"{start} make {unfit[0]} {list(own[unfit[0]])}, which is no part of {list(whole[unfit[0]])} as "
            f"train.techniques has it; raise the rank there"
        )
    _check_factors(shop, part, pairs, start)
    if any(set(trained_in(shop, number)) != set(trained_in(part, number)) for number in _ROUNDS):
        _check_merge(merging.choose(shop.recipe.merge), device)


def _factors(pairs: Sequence[Pair]) -> set[str]:
    return {name for pair in pairs for name in (pair.left, pair.right)}


def _fits(own: tuple[int, ...], whole: tuple[int, ...], is_factor: bool) -> bool:
    if not is_factor:
        return own == whole
    return len(own) == len(whole) and all(a <= b for a, b in zip(own, whole, strict=True))


def _check_factors(shop: "Workshop", part: "Workshop", pairs: Sequence[Pair], start: str) -> None:
    """A mean of factors is one of products only while all train the same one."""
    for number in _ROUNDS:
        one, other = (_factors(pairs) & set(trained_in(each, number)) for each in (shop, part))
        if one != other:
            raise RecipeError(
                f"{start} and train.techniques train different factors of low-rank pairs in round {number}; set "
                "lora: {exact: ...} to the same in both"
            )


def _check_merge(pipeline: merging.Pipeline, device: str) -> None:
    """Where classes train different tensors, a step sees of each tensor only the models that have it."""
    asked = merging.measurement(pipeline.steps)
    combine = pipeline.combine
    needy = [step.name for step in (*pipeline.align, *pipeline.renormalise)]
    needy += [combine.name] if combine.fewest > 1 or combine.most is not None or combine.needs else []
    needy += [step.name for step in pipeline.relax if step.needs] if asked is not None and asked.by == "clients" else []
    if needy:
        raise RecipeError(
            f"merge: {needy[0]} needs all of every model, but {device} trains only a part; drop the step, or let "
            "device classes differ in rank, batch or dtype alone"
        )
