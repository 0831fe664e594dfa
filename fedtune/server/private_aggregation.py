"""Aggregation with privacy: the server checks the norm of each update, weights all equally, and adds noise."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune import paths
from fedtune.files import hash_file
from fedtune.merging import MergeContext, MergePipeline, RelaxStep
from fedtune.privacy import NormalStream, compute_max_update_norm, compute_mean_noise_std, load_or_create_noise_key
from fedtune.recipe.schema import Recipe
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.update_checks import NormLimit

__all__ = ["append_noise_step", "get_norm_limit", "weight_clients_equally"]


def get_norm_limit(recipe: Recipe, shapes: Iterable[tuple[int, ...]]) -> NormLimit:
    """Return the norm above which an update with these shapes is refused."""
    if recipe.privacy is None:
        return NormLimit(recipe.federation.max_update_norm, "federation.max_update_norm")
    largest = compute_max_update_norm(recipe.privacy, sum(math.prod(shape) for shape in shapes))
    return NormLimit(largest, "privacy.clipping_norm")


def weight_clients_equally(recipe: Recipe, contributions: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Return the updates with equal weights if the recipe has privacy. Example counts are private and not bounded."""
    if recipe.privacy is None:
        return list(contributions)
    return [replace(one, num_examples=1) for one in contributions]


class NoiseStep(RelaxStep):
    """The last step of a merge adds noise to the merged delta, before it is rounded to the data type of the weights."""

    name: ClassVar[str] = "noise"
    noise_std: float
    secret: bytes = Field(repr=False)
    purpose: tuple[int | str, ...]

    def relax(self, name: str, start: int, delta: Tensor, evidence: MergeContext) -> Tensor:
        """Return the rows with noise."""
        width = delta[0].numel() if delta.dim() else 1
        return NormalStream(self.secret, *self.purpose, name).add_noise(delta, start * width, self.noise_std)


def append_noise_step(
    recipe: Recipe, pipeline: MergePipeline, run: str, round_number: int, contributions: Sequence[ClientUpdate]
) -> MergePipeline:
    """Return the pipeline with a noise step for the mean of these updates, if the server adds noise.

    The noise depends on the run's secret, which stays in the run's folder, and on the merged updates. A resumed round
    therefore has the same bits, and different sums never get the same noise.
    """
    if recipe.privacy is None or recipe.privacy.noise_added_by == "clients":
        return pipeline
    content = hashlib.sha256("".join(hash_file(one.path) for one in contributions).encode()).hexdigest()
    each = compute_mean_noise_std(recipe.privacy, len(contributions))
    noise = NoiseStep(
        noise_std=each,
        secret=load_or_create_noise_key(paths.get_runs_folder() / run),
        purpose=(run, round_number, content),
    )
    return pipeline._replace(relax=(*pipeline.relax, noise))
