"""What a recipe must not have beside tensors or models that clients keep for themselves."""

from collections.abc import Sequence

from fedtune.algorithms._algorithm import Algorithm
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["find_personal_problem"]


def find_personal_problem(
    algorithm: Algorithm, recipe: Recipe, chosen: Sequence[Technique], pipeline: MergePipeline
) -> str | None:
    """Return why the recipe does not go with what clients keep, as the end of a sentence; None if it does."""
    if not (algorithm.keeps_tensors or algorithm.has_personal_model):
        return None
    return (
        _find_client_problem(recipe)
        or _find_technique_problem(chosen)
        or _find_merge_problem(algorithm, pipeline)
        or _find_privacy_problem(algorithm, recipe)
    )


def _find_client_problem(recipe: Recipe) -> str | None:
    if recipe.stream is not None:
        return "keeps what belongs to one task, and a stream goes on to others; drop one"
    if recipe.num_clients == 1:
        return "is for several clients, and the recipe has one, which would train by itself; raise devices: count"
    apart = [device.name for device in recipe.devices if device.techniques is not None]
    if apart:
        return (
            f"needs all devices to train the same tensors, but {apart[0]} has techniques of its own; let all devices "
            "train alike"
        )
    return None


def _find_technique_problem(chosen: Sequence[Technique]) -> str | None:
    masking = [one.name for one in chosen if one.has_weight_masks()]
    if masking:
        return f"keeps tensors as they are, and {masking[0]} sends masks that change them; drop one"
    renewing = [one for one in chosen if one.renewed_tensors is not None]
    if renewing:
        return f"keeps tensors from round to round past {renewing[0].name}, {renewing[0].renewed_tensors}; drop one"
    return None


def _find_merge_problem(algorithm: Algorithm, pipeline: MergePipeline) -> str | None:
    combine = pipeline.combine
    if combine.update_kind == "pairs and base":
        return f"keeps what was trained on one base, and {combine.name} rewrites the base; merge by mean or fedit"
    if algorithm.has_personal_model and not pipeline.keeps_entries:
        return f"keeps trained tensors, and {combine.name} makes other factors each round; merge by mean or fedit"
    moving = [step.name for step in pipeline.align]
    if moving:
        return f"keeps tensors whose units must stay in place, and {moving[0]} permutes them; drop {moving[0]}"
    return None


def _find_privacy_problem(algorithm: Algorithm, recipe: Recipe) -> str | None:
    if algorithm.keeps_tensors and recipe.privacy is not None:
        return "leaves only clients to score the model, and with privacy they send no scores; take ditto, or drop one"
    return None
