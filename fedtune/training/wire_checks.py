"""Checks that codecs of messages fit each other, the rest of the recipe, and the model."""

import math
from collections.abc import Iterator, Mapping, Sequence

from fedtune.algorithms import Algorithm
from fedtune.errors import RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique
from fedtune.training.device_classes import list_tensors_of_round
from fedtune.training.model_state import get_tensor_shapes
from fedtune.training.run_context import RunContext
from fedtune.wire.codecs import Codec, WirePipeline
from fedtune.wire.recipe_codecs import build_down_pipeline, build_up_pipeline, is_running_statistic, uses_feedback

__all__ = ["check_wire", "check_wire_model"]

Shape = tuple[int, ...]
_NOTHING = WirePipeline()
_FEW = 4
"""Rounds whose tensors are looked at: factors alternate in two."""


def check_wire(
    recipe: Recipe, chosen: Sequence[Technique], pipeline: MergePipeline, algorithm: Algorithm | None
) -> None:
    """Raise RecipeError for codecs that do not follow each other, or that lose what the recipe needs."""
    up, down = build_up_pipeline(recipe) or _NOTHING, build_down_pipeline(recipe) or _NOTHING
    problems = (
        *(_find_feedback_problems(recipe, chosen, pipeline, up) if uses_feedback(recipe) else ()),
        *(_find_up_problems(recipe, chosen, algorithm, up.codecs[0]) if up.codecs else ()),
        *(_find_down_problems(chosen, pipeline, down.codecs) if down.codecs else ()),
    )
    if problems:
        raise RecipeError(problems[0])


def _find_feedback_problems(
    recipe: Recipe, chosen: Sequence[Technique], pipeline: MergePipeline, up: WirePipeline
) -> Iterator[str]:
    start = "wire.error_feedback:"
    if recipe.privacy is not None:
        yield f"{start} it sends again what privacy noised or clipped away before, beyond the accounting; drop one"
    if not up.codecs:
        yield f"{start} wire.up names no codec that loses anything, so nothing is fed back; name one, e.g. top-k"
    if unfit := [one.name for one in up.codecs if not one.is_contraction]:
        yield f"{start} {unfit[0]} enlarges what it sends, so that errors would grow; set unbiased: false"
    if recipe.federation.asynchronous is not None:
        yield f"{start} estimates are of the round before, and federation.asynchronous merges late updates; drop one"
    if recipe.stream is not None:
        yield f"{start} estimates are of one task's update, and each task of a stream has another; drop one"
    if renewing := [one for one in chosen if one.renewed_tensors is not None]:
        yield f"{start} estimates do not fit {renewing[0].name}, {renewing[0].renewed_tensors}; drop one"
    if not pipeline.keeps_entries:
        yield (
            f"{start} estimates do not fit the factors that {pipeline.combine.name} makes anew each round; merge by "
            "fedit, or train one factor and merge by mean"
        )


def _find_up_problems(
    recipe: Recipe, chosen: Sequence[Technique], algorithm: Algorithm | None, first: Codec
) -> Iterator[str]:
    if recipe.privacy is not None:
        yield f"wire.up: {first.name} changes updates after privacy has clipped and noised them; name zstd alone"
    if sending := [one.name for one in chosen if one.replaces_update]:
        yield f"wire.up: {sending[0]} sends scalars of seeds, which must arrive exactly; name zstd alone"
    if algorithm is not None and algorithm.needs_exact_updates:
        yield (
            f"wire.up: {first.name} loses a part of the updates that {algorithm.name} adds up on server and devices "
            "alike; name zstd alone, or take scaffold"
        )


def _find_down_problems(chosen: Sequence[Technique], pipeline: MergePipeline, codecs: Sequence[Codec]) -> Iterator[str]:
    if unfit := [one.name for one in codecs if not one.suits_weights]:
        yield f"wire.down: {unfit[0]} is for changes of weights, not for weights; name bf16, int8 or int4"
    if masking := [one.name for one in chosen if one.has_weight_masks()]:
        yield f"wire.down: {masking[0]} sends the active weights of exact masks; name zstd alone"
    if sending := [one.name for one in chosen if one.replaces_update]:
        yield f"wire.down: {sending[0]} rebuilds all weights from the scalars it gets, exactly; name zstd alone"
    if pipeline.combine.update_kind == "pairs and base":
        yield (
            f"wire.down: {pipeline.combine.name} writes into base weights, which devices must hold exactly; name zstd "
            "alone, or merge by fedit"
        )


def check_wire_model(context: RunContext) -> None:
    """Raise RecipeError if a codec asks for more entries than a tensor has, or cannot make any tensor smaller."""
    pipeline = build_up_pipeline(context.recipe) or _NOTHING
    for part in (context, *context.by_device_class.values()):
        shapes, sent = get_tensor_shapes(part.model), dict[str, Shape]()
        for number in range(1, min(context.recipe.federation.rounds, _FEW) + 1):
            sent |= {name: shapes[name] for name in list_tensors_of_round(part, number)}
        coded = {name: shape for name, shape in sorted(sent.items()) if not is_running_statistic(name)}
        for codec in pipeline.codecs:
            _check_shapes(codec, coded)


def _check_shapes(codec: Codec, shapes: Mapping[str, Shape]) -> None:
    for name, shape in shapes.items():
        if codec.count_too_many(shape):
            size = math.prod(shape)
            raise RecipeError(
                f"wire.up, {codec.name}: it takes {size + codec.count_too_many(shape)} entries, but {name} has {size}; "
                "lower k, or set a share, e.g. 0.1"
            )
    if shapes and not any(codec.changes(shape) for shape in shapes.values()):
        raise RecipeError(
            f"wire.up, {codec.name}: it makes no tensor of this recipe smaller; lower its rank, or drop it"
        )
