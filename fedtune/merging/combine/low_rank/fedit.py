"""FedIT: average both factors of each low-rank pair separately, which differs from the average of their products.

What: B = sum_i w_i B_i and A = sum_i w_i A_i. The product misses sum_i w_i (B_i - B)(A_i - A), the covariance of the
factors over the clients. ``merge factor_error`` records its size relative to the mean of the products in each round.
Memory: the factors of one pair, of every client. Needs ``lora: {trained_factors: both}``: clients train both factors.
Use when: you need a baseline, or the recorded error stays under a few percent (short rounds from a common start).
Avoid when: clients train long or differ much. Use ``flexlora`` or ``fedex-lora``, or train one factor per round.
Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (arXiv 2305.05644). The error
is that of Singhal et al. (arXiv 2410.09432).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._low_rank_factors import LowRankFactors, average_factors
from fedtune.merging._step import MergeContext
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep, write_factors
from fedtune.wire.client_update import LowRankPair

__all__ = ["Fedit"]


@final
class Fedit(LowRankPairCombineStep):
    """Averages the factors."""

    name: ClassVar[str] = "fedit"
    keeps_factors: ClassVar[bool] = True

    def combine_pair(
        self,
        pair: LowRankPair,
        state: Mapping[str, Tensor],
        factors: Sequence[LowRankFactors],
        weights: Sequence[float],
        context: MergeContext,
    ) -> dict[str, Tensor]:
        """Mean B and mean A."""
        return write_factors(pair, average_factors(factors, weights), state)
