"""Geometric median: the point with the smallest summed distance to all models, which no minority can move far.

What: Weiszfeld's iteration c_i ~ w_i / max(eps, |v - x_i|), v = sum_i c_i x_i, on coefficients. Distances are those of
whole models, as in robust federated learning, or of each tensor.
Memory: two passes, one chunk of each model. Distances are computed from inner products.
Use when: some client updates may be broken or hostile. It is robust while their share of the weights is below one half.
Avoid when: the clients' data differ much and all clients are honest, because it favours the majority. With two models,
any point between them is a median.
Source: Pillutla, Kakade, Harchaoui, RFA (arXiv 1912.13445), algorithm 2, smoothed with eps; run to convergence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import compute_model_gram
from fedtune.merging.combine._weights import normalise_weights, stack_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations.linear import Linear

__all__ = ["GeometricMedian"]


class GeometricMedian(GramCombineStep):
    """The smoothed geometric median."""

    name: ClassVar[str] = "geometric-median"
    weighs_whole_updates: ClassVar[bool] = True
    adds_variance_of_means: ClassVar[bool] = False
    granularity: Literal["model", "tensor"] = "model"
    eps: float = Field(1e-6, gt=0, description="smaller distances count as this value")
    max_iterations: int = Field(1000, ge=1)
    tolerance: float = Field(1e-9, ge=0, description="stop when the coefficients change by less")

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """With distances of whole models, a linear merge with the coefficients of their median."""
        if self.granularity == "tensor":
            return BoundCombine(self, merge_inputs)
        c = self.compute_coefficients(stack_weights(merge_inputs), lambda: compute_model_gram(shapes, merge_inputs))
        settled = [one._replace(weight=float(weight)) for one, weight in zip(merge_inputs, c, strict=True)]
        return BoundCombine(Linear(normalise=False), settled)

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The coefficients of Weiszfeld's algorithm, started at the weighted mean."""
        share, products = normalise_weights(weights), gram()
        c = share
        for _ in range(self.max_iterations):
            pulled = normalise_weights(share / _compute_distances(c, products).clamp_min(self.eps))
            moved, c = float((pulled - c).abs().max()), pulled
            if moved <= self.tolerance:
                break
        return c


def _compute_distances(c: Tensor, gram: Tensor) -> Tensor:
    """|x_i - sum_j c_j x_j| [K, G]."""
    products = torch.einsum("ijg,jg->ig", gram, c)
    square = torch.einsum("iig->ig", gram) - 2 * products + (c * products).sum(0)
    return square.clamp_min(0).sqrt()
