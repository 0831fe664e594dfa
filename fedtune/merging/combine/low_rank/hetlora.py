"""HetLoRA: pad factors with zeros to one rank and average them, weighting clients by the norm of their product.

What: B = sum_i p_i B_i and A = sum_i p_i A_i with p_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F, per pair. Smaller ranks
are padded with zeros. Heads and biases get the mean weighted by examples. ``merge factor_error`` records in each round
the error of a mean of factors weighted by examples.
Memory: the factors of one pair, of every client. Needs ``lora: {trained_factors: both}``: clients train both factors.
Use when: ranks differ and the server must stay as cheap as averaging.
Avoid when: the bias of averaging factors matters. It is that of FedIT. Padding also assumes that all clients order
their ranks in the same way.
Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (arXiv 2401.06432).
Ours: weights are computed per pair, not over the whole model; clients do not prune their own ranks yet.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._low_rank_factors import LowRankFactors, average_factors, compute_product_norm
from fedtune.merging._step import MergeContext
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep, write_factors
from fedtune.wire.client_update import LowRankPair

__all__ = ["Hetlora", "weigh_by_product_norm"]


@final
class Hetlora(LowRankPairCombineStep):
    """Averages padded factors, weighted by the norms of the products."""

    name: ClassVar[str] = "hetlora"
    keeps_factors: ClassVar[bool] = True

    def combine_pair(
        self,
        pair: LowRankPair,
        state: Mapping[str, Tensor],
        factors: Sequence[LowRankFactors],
        weights: Sequence[float],
        context: MergeContext,
    ) -> dict[str, Tensor]:
        """Means weighted by the products' norms; clients of weight zero are left out."""
        return write_factors(pair, average_factors(factors, weigh_by_product_norm(factors, weights)), state)


def weigh_by_product_norm(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> list[float]:
    """Each product's norm divided by the sum of norms; the weights if all norms are zero."""
    norms = [compute_product_norm(one) if weight else 0.0 for one, weight in zip(factors, weights, strict=True)]
    total = sum(norms)
    return [one / total for one in norms] if total else list(weights)
