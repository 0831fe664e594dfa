"""FlexLoRA: average the products of the low-rank pairs, and truncate the mean to the rank with an SVD.

What: D = sum_i w_i s_i B_i A_i, then the best approximation of D with the rank of the shared pair. D is never formed:
the stacked factors give a core of K r x K r with the same singular values. ``merge rank_error`` records in each round
what the truncation loses, beside the ``factor_error`` that a mean of the factors would have.
Memory: the factors of one pair, of every client, and a square core with the sum of their ranks as its side.
Use when: clients train both factors (``lora: {trained_factors: both}``) and may have different ranks.
Avoid when: the clients' updates point in different directions. The truncated result is then hardly better than FedIT.
``fedex-lora`` keeps the rest in the base, and training one factor per round (``trained_factors: alternate``) is exact.
Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
(arXiv 2402.11505). Ours: the small core. Both factors get the square roots of the singular values.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._factor_svd import truncate_product
from fedtune.merging._low_rank_factors import LowRankFactors, stack_factors
from fedtune.merging._step import MergeContext
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep, write_factors
from fedtune.wire.client_update import LowRankPair

__all__ = ["Flexlora"]


@final
class Flexlora(LowRankPairCombineStep):
    """Truncates the mean product to the pair's rank."""

    name: ClassVar[str] = "flexlora"

    def combine_pair(
        self,
        pair: LowRankPair,
        state: Mapping[str, Tensor],
        factors: Sequence[LowRankFactors],
        weights: Sequence[float],
        context: MergeContext,
    ) -> dict[str, Tensor]:
        """The largest singular values, split evenly over both factors."""
        rank = len(state[pair.right])
        return write_factors(
            pair, truncate_product(stack_factors(factors, weights), rank, scale=pair.scale).factors, state
        )

    def measure_errors(self, factors: Sequence[LowRankFactors], weights: Sequence[float]) -> dict[str, float]:
        """Also the norm of the singular values that are cut off."""
        cut = truncate_product(stack_factors(factors, weights), factors[0].rank).dropped_norm
        return {**super().measure_errors(factors, weights), "rank_error": cut}
