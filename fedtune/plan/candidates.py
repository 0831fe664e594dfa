"""The settings that a plan considers: lists of techniques for a kind of model, and precisions."""

from collections.abc import Sequence
from typing import NamedTuple

from fedtune.recipe.schema import Recipe, Unit
from fedtune.tasks import get_task

__all__ = ["Candidate", "list_candidates"]


class Candidate(NamedTuple):
    """Techniques and the precision of the weights."""

    techniques: tuple[Unit, ...]
    dtype: str


_TOKENS = (
    "lora+fused-cross-entropy",
    "lora+gradient-checkpointing+fused-cross-entropy",
    "meft+fused-cross-entropy",
    "qlora+gradient-checkpointing+fused-cross-entropy",
    "full+gradient-checkpointing+fused-cross-entropy",
)
_OWN_IMAGE_MODELS = ("full", "full+gradient-checkpointing", "mobiletl", "tinytl", "full+activation-pruning")
_OTHERS = ("lora", "lora+gradient-checkpointing", "meft", "qlora+gradient-checkpointing", "full+gradient-checkpointing")
_IMAGES_OF_TRANSFORMERS = ("lora", "lora+gradient-checkpointing", "meft", "full+gradient-checkpointing")
"""Lists by what a task predicts from, the fewest that span the choice between time and memory.

``head-only`` and ``bias`` train too little to stand for the others, so they are planned only if they are named.
"""


def list_candidates(
    recipe: Recipe, own: Sequence[Sequence[Unit]] | None, *, is_own_image_model: bool
) -> list[Candidate]:
    """Return the candidates: ``own`` lists if given, else the recipe's and those of the task."""
    lists = [tuple(units) for units in own] if own else _list_defaults(recipe, is_own_image_model)
    distinct = list({_key(units): units for units in lists}.values())
    return [Candidate(units, recipe.model.dtype) for units in distinct]


def _list_defaults(recipe: Recipe, is_own_image_model: bool) -> list[tuple[Unit, ...]]:
    task = get_task(recipe.task)
    # Where each token has a prediction, the logits take most of the memory.
    named: tuple[str, ...] = _TOKENS if task.can_pack else _OTHERS
    if task.can_augment:  # images
        named = _OWN_IMAGE_MODELS if is_own_image_model else _IMAGES_OF_TRANSFORMERS
    has_own = recipe.data.source != "random" and all(unit.name != "auto" for unit in recipe.train.techniques)
    given = [tuple(recipe.train.techniques)] if has_own else []
    return [*given, *(_parse(joined) for joined in named)]


def _parse(joined: str) -> tuple[Unit, ...]:
    return tuple(Unit(name=name) for name in joined.split("+"))


def _key(units: Sequence[Unit]) -> str:
    return "+".join(f"{unit.name}{unit.settings}" for unit in units)
