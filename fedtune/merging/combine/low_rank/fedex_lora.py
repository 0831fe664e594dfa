"""FedEx-LoRA: average both factors and add the error of this average to the base weights, so that the result is exact.

What: B = sum_i w_i B_i, A = sum_i w_i A_i, W <- W + s sum_i w_i (B_i - B)(A_i - A). Then W + s B A equals W plus the
mean of the clients' products. ``merge factor_error`` records in each round which fraction of the mean went into the
base.
Memory: the factors of one pair, of every client, and one chunk of the dense remainder. A device stores the base weights
of two rounds on its disk.
Sends: the pairs, up and down. A device that has the base of an earlier round receives the remainders since then as
factors. Their rank is smaller than the sum of all clients' ranks by the rank of one client. Other devices, and those
that missed too many rounds, receive the whole base.
Use when: exact aggregation with both factors trained is worth the downlink. Needs ``lora: {trained_factors:
both-and-base}``.
Avoid when: clients take part only once, or the base is quantised: it must be writable.
Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models"
(arXiv 2410.09432). Ours: weights need not be equal. Server and devices add the same remainder, as the fp32 factors of
its singular value decomposition.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._low_rank_factors import LowRankFactors, average_factors, compute_averaging_residual
from fedtune.merging._step import MergeContext
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep, write_factors
from fedtune.wire.client_update import LowRankPair, UpdateKind

__all__ = ["FedexLora"]


@final
class FedexLora(LowRankPairCombineStep):
    """Averages the factors and adds the residual to the base weight."""

    name: ClassVar[str] = "fedex-lora"
    rewrites: ClassVar[str] = "rewrites the base"
    update_kind: ClassVar[UpdateKind] = "pairs and base"

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

    def compute_base_increment(self, factors: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
        """The covariance of the factors, which is the residual of averaging."""
        return compute_averaging_residual(factors, weights)
