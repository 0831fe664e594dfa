"""What a server does where the recipe asks for privacy: believe no norm, weigh all alike, add noise to the mean."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune import home
from fedtune.contribution import Contribution
from fedtune.files import sha256
from fedtune.merging import Evidence, Pipeline, Relax
from fedtune.privacy import Normals, deviation_of_mean, largest_norm, secret
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


class Noise(Relax):
    """The last step of a merge: noise on the merged delta, before any rounding to the weights it is added to."""

    name: ClassVar[str] = "noise"
    deviation: float
    secret: bytes = Field(repr=False)
    place: tuple[int | str, ...]

    def relax(self, name: str, start: int, delta: Tensor, evidence: Evidence) -> Tensor:
        """The rows with noise of their own."""
        width = delta[0].numel() if delta.dim() else 1
        return Normals(self.secret, *self.place, name).added(delta, start * width, self.deviation)


def with_noise(
    recipe: Recipe, pipeline: Pipeline, run: str, number: int, contributions: Sequence[Contribution]
) -> Pipeline:
    """The merge, with noise for the mean of these contributions at its end where the server is to add it.

    It comes from the run's secret, which stays in the run's folder, and from what is merged: a resumed round has the
    same bits, and no two different sums ever have the same noise.
    """
    if recipe.privacy is None or recipe.privacy.where == "client":
        return pipeline
    content = hashlib.sha256("".join(sha256(one.path) for one in contributions).encode()).hexdigest()
    each = deviation_of_mean(recipe.privacy, len(contributions))
    noise = Noise(deviation=each, secret=secret(home.runs() / run), place=(run, number, content))
    return pipeline._replace(relax=(*pipeline.relax, noise))
