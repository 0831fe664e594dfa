"""The weights of the models in a merge, and the settings by which steps use them."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._step import MergeInput

__all__ = ["Normalise", "Scale", "normalise_weights", "stack_weights"]

Normalise = Annotated[bool, Field(validation_alias=AliasChoices("normalise", "normalize"))]
Scale = Annotated[float, Field(validation_alias=AliasChoices("scale", "lambda"))]


def stack_weights(merge_inputs: Sequence[MergeInput]) -> Tensor:
    """The weights [K, 1], double."""
    return torch.tensor([[merge_input.weight] for merge_input in merge_inputs], dtype=torch.float64)


def normalise_weights(weights: Tensor) -> Tensor:
    """Weights [K, ...] that sum to one over the models; RecipeError when their sum is zero."""
    total = weights.sum(0)
    if bool((total == 0).any()):
        raise RecipeError("merge: the weights sum to zero, so they are no shares of anything; change one of them")
    return weights / total
