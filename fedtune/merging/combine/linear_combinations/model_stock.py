"""Model stock: the mean of fine-tunes, moved back towards the base if they agree little.

What: t * mean_i x_i with t = N c / (1 + (N-1) c), where c is the mean cosine between pairs of deltas, per tensor or per
row.
Memory: two passes, one chunk of each model, and one coefficient per row.
Use when: several fine-tunes of one base for one task differ by noise. The result is close to the mean of many more
models.
Avoid when: the fine-tunes are for different tasks. Their deltas are nearly orthogonal, and t removes almost everything.
Source: Jang, Yun, Han (arXiv 2403.19522), the ratio for N models. All models have the same weight; t is at least zero.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging.combine._inner_products import Granularity
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations._sphere import compute_cosines

__all__ = ["ModelStock"]


class ModelStock(GramCombineStep):
    """The mean, scaled by t."""

    name: ClassVar[str] = "model-stock"
    min_models: ClassVar[int] = 2
    granularity: Literal["tensor", "row"] = Field("tensor", description="what gets its own t")

    @property
    def coefficient_scope(self) -> Granularity:
        """As ``granularity`` says."""
        return self.granularity

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """t / N for every model."""
        count = len(weights)
        cosine = compute_cosines(gram())
        c = (cosine.sum((0, 1)) - torch.einsum("iig->g", cosine)) / (count * (count - 1))
        t = (count * c / (1 + (count - 1) * c)).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
        return (t / count).expand(count, -1)
