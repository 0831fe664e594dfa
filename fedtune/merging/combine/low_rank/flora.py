"""FLoRA: stack the clients' pairs, which is exact, and merge them into the base weights; new pairs start at zero.

What: W <- W + sum_i w_i s_i B_i A_i. Then B = 0 and A is drawn again from ``seed`` and the round.
Memory: the factors of one pair, of every client, and one chunk of the dense product. A device stores the base weights
of two rounds on its disk.
Sends: the pairs, up and down. A device that has the base of an earlier round receives what was added since then, as
factors whose rank is at most the sum of the clients' ranks per round. Other devices receive the whole base, and so do
those that missed so many rounds that the base is smaller.
Use when: each round should be able to add new directions, so that many rounds give an update of high rank. Clients may
have different ranks. Needs ``lora: {trained_factors: both-and-base}``.
Avoid when: clients take part only once, the base is quantised, or rounds are so short that a pair that starts at zero
learns little.
Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations" (arXiv
2409.05976). Ours: server and devices add the same fp32 factors to the base, those of the singular value decomposition
of the sum; the authors send the factors of every client. The scale is part of the product, and factors are identified
by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging._low_rank_factors import LowRankFactors, stack_factors
from fedtune.merging._step import MergeContext
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep
from fedtune.seeds import derive_seed
from fedtune.wire.client_update import LowRankPair, UpdateKind

__all__ = ["Flora"]


@final
class Flora(LowRankPairCombineStep):
    """Adds the stacked product to the base weight and restarts the pairs."""

    name: ClassVar[str] = "flora"
    rewrites: ClassVar[str] = "rewrites the base"
    update_kind: ClassVar[UpdateKind] = "pairs and base"
    seed: int = Field(0, ge=0, description="seed for A, together with the round")

    def combine_pair(
        self,
        pair: LowRankPair,
        state: Mapping[str, Tensor],
        factors: Sequence[LowRankFactors],
        weights: Sequence[float],
        context: MergeContext,
    ) -> dict[str, Tensor]:
        """B set to zero and a new A."""
        drawn = _draw_factor(state[pair.right], derive_seed(self.seed, context.round_number, pair.right))
        return {pair.left: torch.zeros_like(state[pair.left]), pair.right: drawn}

    def compute_base_increment(self, factors: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
        """The stacked product of all clients."""
        return stack_factors(factors, weights)


def _draw_factor(a: Tensor, seed: int) -> Tensor:
    """A new A [r, k, ...], initialised as by PEFT: uniform within 1 / sqrt(number of inputs)."""
    bound = 1 / math.sqrt(a[0].numel())
    return torch.empty(a.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
