"""Checks of device classes with their own settings, which train only some of the shared tensors or other shapes.

Every shared tensor must exist in the model of each class, otherwise the models would compute different functions.
Low-rank pairs may be truncated to a smaller rank. A class may train only shared tensors, and the same factors of each
low-rank pair as all others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune import merging, techniques
from fedtune.errors import RecipeError
from fedtune.training.model_state import get_tensor_shapes
from fedtune.wire.client_update import LowRankPair

if TYPE_CHECKING:
    from fedtune.training.run_context import RunContext

__all__ = ["check_device_class", "get_received_shapes", "list_tensors_of_round"]

_ROUNDS = (1, 2)
"""Two consecutive rounds, because some techniques alternate between rounds."""


def list_tensors_of_round(context: "RunContext", number: int) -> list[str]:
    """Return the names of the tensors that the clients of a context train in a round."""
    techniques.begin_round(context.techniques, context.model, number)
    return techniques.list_trainable_tensors(context.model)


def get_received_shapes(context: "RunContext", part: "RunContext") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the shared tensors in the model of a device class, by name."""
    own = get_tensor_shapes(part.model)
    return {name: own[name] for name in context.shared_names if name in own}


def check_device_class(context: "RunContext", part: "RunContext", device: str) -> None:
    """Raise RecipeError unless a device class trains only shared tensors of the common model."""
    start = f"devices: the techniques of {device}"
    mend = "give the class and train.techniques such as differ in how much they train"
    own = get_received_shapes(context, part)
    if lacking := sorted(set(context.shared_names) - own.keys()):
        raise RecipeError(f"{start} leave no place for {lacking[0]}, which train.techniques shares; {mend}")
    if unshared := sorted({name for number in _ROUNDS for name in list_tensors_of_round(part, number)} - own.keys()):
        raise RecipeError(f"{start} train {unshared[0]}, which train.techniques does not share; {mend}")
    pairs = techniques.list_low_rank_pairs(context.techniques, context.model)
    whole = get_tensor_shapes(context.model)
    if unfit := [name for name in own if not _fits(own[name], whole[name], name in _factors(pairs))]:
        raise RecipeError(
            f"{start} make {unfit[0]} {list(own[unfit[0]])}, which is no part of {list(whole[unfit[0]])} as "
            f"train.techniques has it; raise the rank there"
        )
    _check_factors(context, part, pairs, start)
    if any(
        set(list_tensors_of_round(context, number)) != set(list_tensors_of_round(part, number)) for number in _ROUNDS
    ):
        _check_merge(merging.build_pipeline(context.recipe.merge), device)


def _factors(pairs: Sequence[LowRankPair]) -> set[str]:
    return {name for pair in pairs for name in (pair.left, pair.right)}


def _fits(own: tuple[int, ...], whole: tuple[int, ...], is_factor: bool) -> bool:
    if not is_factor:
        return own == whole
    return len(own) == len(whole) and all(a <= b for a, b in zip(own, whole, strict=True))


def _check_factors(context: "RunContext", part: "RunContext", pairs: Sequence[LowRankPair], start: str) -> None:
    """Raise RecipeError unless all train the same factor. Otherwise the mean of factors is no mean of products."""
    for number in _ROUNDS:
        one, other = (_factors(pairs) & set(list_tensors_of_round(each, number)) for each in (context, part))
        if one != other:
            raise RecipeError(
                f"{start} and train.techniques train different factors of low-rank pairs in round {number}; set "
                "lora: {trained_factors: ...} to the same in both"
            )


def _check_merge(pipeline: merging.MergePipeline, device: str) -> None:
    """Raise RecipeError for merge steps that need every tensor of every model, if classes train different tensors."""
    request = merging.build_calibration_request(pipeline.steps)
    combine = pipeline.combine
    needy = [step.name for step in (*pipeline.align, *pipeline.renormalise)]
    needy += [combine.name] if combine.min_models > 1 or combine.max_models is not None or combine.needs else []
    needy += (
        [step.name for step in pipeline.relax if step.needs]
        if request is not None and request.calibrate_on == "clients"
        else []
    )
    if needy:
        raise RecipeError(
            f"merge: {needy[0]} needs all of every model, but {device} trains only a part; drop the step, or let "
            "device classes differ in rank, batch or dtype alone"
        )
