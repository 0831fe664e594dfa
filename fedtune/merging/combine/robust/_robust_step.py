"""The base classes of robust merges: all models count the same, and some steps compare whole models first."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.merging.combine._inner_products import compute_model_gram

__all__ = ["DistanceStep", "RobustStep", "compute_finite_gram", "compute_square_distances", "require_finite_rows"]


class RobustStep(CombineStep, ABC):
    """A merge without weights: a client that reports many examples would have a large one."""

    adds_variance_of_means: ClassVar[bool] = False

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)


class DistanceStep(RobustStep, ABC):
    """A merge that selects models by their distances, while at most ``f`` of them are hostile."""

    f: int = Field(1, ge=1, description="number of models that may be hostile")

    def require_models(self, count: int) -> None:
        """Raise RecipeError if there are fewer models than ``f`` hostile ones allow."""
        if count < self.required_models:
            raise RecipeError(
                f"merge: {self.name} with f {self.f} needs at least {self.required_models} models, but {count} were "
                "given; lower f or add models"
            )


def compute_finite_gram(name: str, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput]) -> Tensor:
    """Inner products [K, K] of whole models, double; ClientUpdateError names a model that is not finite."""
    gram = compute_model_gram(shapes, merge_inputs)[:, :, 0]
    for number, square in enumerate(gram.diagonal().isfinite().tolist(), 1):
        if not square:
            raise ClientUpdateError(f"merge: {name}: model {number} has values that are not finite; leave it out")
    return gram


def compute_square_distances(gram: Tensor) -> Tensor:
    """|x_i - x_j|^2 [K, K] from inner products."""
    squares = gram.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0)


def require_finite_rows(name: str, tensor: str, rows: Sequence[Tensor]) -> None:
    """Raise ClientUpdateError if the rows of a model are not finite: sorting would take NaN for a large value."""
    for number, one in enumerate(rows, 1):
        if not bool(one.isfinite().all()):
            raise ClientUpdateError(f"merge: {name}: {tensor} of model {number} is not finite; leave this model out")
