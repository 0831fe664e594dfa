"""LoRM: merge one factor of low-rank pairs so that the merged layer gives every model's outputs, as far as it can.

What: RegMean on one factor, while all models share the other. If A was trained, A = (sum_i w_i A_i G_i) (sum_i w_i
G_i)^+, where G_i is the mean of x x^T over the layer's inputs on model i's data. If B was trained, B = (sum_i w_i B_i
H_i) (sum_i w_i H_i)^+ with H_i = A G_i A^T, which is the same mean over B's own inputs, A x. Statistics are therefore
those of the inputs of the layer that has the factor as its weight. Rounds that alternate between A and B find both.
Tensors without statistics get the weighted mean.
Memory: one chunk of the delta and one Gram matrix per model, in double precision: [in, in] for A, [rank, rank] for B.
Use when: models were trained on different data from one common factor, and Gram matrices of their inputs are available.
For the end of a stream of tasks, the authors take the mean of the products over tasks: ``experts: [mean]``.
Avoid when: both factors were trained (refused), or layers are wide: a Gram matrix of A's inputs is larger than the
factors. As fisher and regmean, this step reads statistics from files, so it serves ``fedtune merge`` and no round.
Source: Salami et al., "Closed-form Merging of Parameter-Efficient Modules for Federated Continual Learning" (arXiv
2410.17961), as in the authors' code. Ours: deltas to the common start are merged, so that directions that no input has
keep the start (theirs: zero). Eigenvalues below ``rtol`` of the largest count as zero, as statistics are fp32 (theirs:
1e-15, which rounding errors exceed). Means are weighted; theirs are sums over examples, which is the same with weights
by the number of examples.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine._gram_regression import GramRegressionStep

__all__ = ["Lorm"]


class Lorm(GramRegressionStep):
    """Fits one factor to the outputs of all models."""

    name: ClassVar[str] = "lorm"
    rtol: float = Field(1e-6, gt=0, lt=1, description="eigenvalues below this fraction of the largest count as zero")

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step itself, after checking that no pair was trained whole."""
        for pair in context.low_rank_pairs:
            if {pair.left, pair.right} <= shapes.keys():
                raise RecipeError(
                    f"merge: lorm fits one factor while all models share the other, but both {pair.left} and "
                    f"{pair.right} came; set lora: {{trained_factors: alternate}} or choose fedex-lora"
                )
        return super().bind(shapes, merge_inputs, context)

    def compute_mixing(self, grams: Sequence[Tensor], share: Sequence[float]) -> list[Tensor]:
        """M_i = w_i G_i (sum_j w_j G_j)^+; they sum to the projection on all inputs."""
        inverse = torch.linalg.pinv(torch.stack(list(grams)).sum(0), rtol=self.rtol, hermitian=True)
        return [found @ inverse for found in grams]
