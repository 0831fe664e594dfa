"""What a server does where the recipe asks for privacy: believe no norm, weigh all alike, add noise to the mean."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedtune import home
from fedtune.contribution import Contribution
from fedtune.files import sha256
from fedtune.privacy import deviation, largest_norm, noised, secret
from fedtune.recipe import Recipe

__all__ = ["alike", "norm_limit", "with_noise"]


def norm_limit(recipe: Recipe, shapes: Iterable[tuple[int, ...]]) -> tuple[float | None, str]:
    """The norm above which a contribution is refused, and the recipe's key that says so."""
    if recipe.privacy is None:
        return recipe.federation.max_norm, "federation.max_norm"
    return largest_norm(recipe.privacy, sum(math.prod(shape) for shape in shapes)), "privacy.clip"


def alike(recipe: Recipe, contributions: Sequence[Contribution]) -> list[Contribution]:
    """With privacy every contribution counts the same: weights by examples would tell, and would not be bounded."""
    if recipe.privacy is None:
        return list(contributions)
    return [replace(one, examples=1) for one in contributions]


def with_noise(
    recipe: Recipe,
    run: str,
    number: int,
    merged: Mapping[str, Tensor],
    names: Iterable[str],
    contributions: Sequence[Contribution],
) -> dict[str, Tensor]:
    """The merged state, with noise on the named tensors where the server is to add it: of the sum, divided by n.

    It comes from the run's secret, which stays in the run's folder, and from what was merged: a resumed round has the
    same bits, and no two different sums ever have the same noise.
    """
    privacy = recipe.privacy
    if privacy is None or privacy.where == "client":
        return dict(merged)
    content = hashlib.sha256("".join(sha256(one.path) for one in contributions).encode()).hexdigest()
    named = {name: merged[name] for name in names}
    each = deviation(privacy) / len(contributions)
    return {**merged, **noised(named, each, secret(home.runs() / run), run, number, content)}
