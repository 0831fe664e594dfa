"""FedKSeed: clients train without a backward pass and send one scalar for each of K directions that all of them know.

What: the trained weights are w_0 + sum_k a_k z_k. The K directions z_k are drawn from seeds that follow from the run's
seed, so that devices and server know them without a message. A client's step draws one of them, takes the slope of the
loss along it as ``mezo`` does, and adds -lr slope to its scalar. All steps of a round leave as K scalars. The server
merges these, and everybody rebuilds the weights from w_0 and the scalars, in the order of k.
Saves: all activations, gradients and optimiser state, as ``mezo`` does. A second copy of what is trained stays in
memory, w_0, so that full fine-tuning holds the model twice, and LoRA next to nothing more.
Sends: K numbers in each direction, 16 KiB for K = 4096, whatever the size of the model. A device that was away needs no
more than the scalars of now.
Costs: the steps of ``mezo``, and a rebuild for each client and round: a normal number per trained weight and scalar
that is not zero, about 7 ns each. With K = 4096 that is 3 s for 100,000 weights and 3 minutes for 6 million.
Exactness: rebuilt weights have the same bits everywhere, after any absence and after a resume. They differ from those
that a client held at the end of its own steps by rounding.
Merges: a mean of scalars is the mean of the weights. Merges that weigh whole updates compare vectors of scalars, whose
distances are those of the weights up to a common factor where K is much smaller than their number. ``fedavgm`` has the
momentum of the weights; adaptive server optimisers scale directions instead of weights. Clipping and noise of
``privacy`` apply to the scalars. Merges entry by entry are refused, since most clients leave a scalar at zero, and so
are merges and algorithms that work on weights.
Use when: the uplink is a few kilobytes, devices come and go, or memory allows inference and not more.
Avoid when: a backward pass fits and LoRA's factors can be sent. They reach the same loss in far fewer steps.
Settings: K of 1,024 to 4,096 in the paper; fewer are a smaller subspace, and rebuild faster. Train ``full``, or LoRA
with ``trained_factors: b-only``; with ``both``, the mean of factors is not the mean of products.
Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes" (arXiv 2312.06353), Algorithm 1. Deviations: seeds are drawn uniformly (FedKSeed, not
FedKSeed-Pro); a client sends sums per seed instead of a list of pairs, whose order would not matter; each round begins
with rebuilt weights, not with those of the last one.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtune.seeds import derive_seed
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique
from fedtune.techniques.zeroth_order._projected_gradient import ProjectedGradientStep, find_gradient_conflict
from fedtune.techniques.zeroth_order._seed_sum import SeedSum, attach_seed_sum, find_seed_sum, remove_seed_sum

__all__ = ["Fedkseed"]


class Fedkseed(Technique):
    """Train scalars of directions that all devices draw from the same seeds."""

    name: ClassVar[str] = "fedkseed"
    selects_trainable_tensors: ClassVar[bool] = False
    has_exact_gradients: ClassVar[bool] = False
    estimates_gradients: ClassVar[bool] = True
    replaces_update: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    allows_kv_cache: ClassVar[bool] = True

    seeds: int = Field(4096, ge=1, le=1 << 20, description="number of directions; a client sends one scalar for each")
    epsilon: float = Field(1e-3, gt=0, description="how far the weights are moved along a direction, in each sense")

    def find_conflict(self, other: Technique) -> str | None:
        """Refuse what needs gradients, and what trains other tensors than in the first round, or rewrites the base."""
        if (why := find_gradient_conflict(self, other)) is not None:
            return why
        if other.changes_per_round():
            mend = "; set trained_factors: b-only" if other.get_update_kind() == "one factor" else ""
            return f"scalars belong to the same tensors in all rounds, and {other.name} trains others each round{mend}"
        if other.get_update_kind() == "pairs and base":
            return f"scalars are all that is sent, and {other.name} sends a base too; set trained_factors: b-only"
        return None

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Add the scalars. What they are the scalars of is known once all techniques have chosen what is trained."""
        attach_seed_sum(model, self.seeds, seed)

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Take over what other techniques train."""
        _get_seed_sum(model).take_trained(model)

    def make_step_estimator(
        self, model: nn.Module, masters: Mapping[str, nn.Parameter], seed: int
    ) -> ProjectedGradientStep:
        """Return the steps of a round, each along one of the directions."""
        found = _get_seed_sum(model)
        return ProjectedGradientStep(found.list_trained(model), self.epsilon, _CandidateDirections(found, seed))

    def for_depth(self, blocks: int, fewest: int) -> None:
        """Return None: the values that the sum begins with do not lie in the blocks."""

    def _fold(self, model: nn.Module) -> None:
        """Keep the weights, and drop the scalars."""
        remove_seed_sum(model)


def _get_seed_sum(model: nn.Module) -> SeedSum:
    found = find_seed_sum(model)
    assert found is not None, "rewrite_model comes first"
    return found


class _CandidateDirections:
    """One of the sum's directions for each step, drawn anew in each round, whose scalar takes the change."""

    def __init__(self, weights: SeedSum, seed: int) -> None:
        self._weights, self._seed = weights, seed

    def _choose(self, step: int) -> int:
        return derive_seed(self._seed, step) % len(self._weights.seeds)

    def get_seed(self, step: int) -> int:
        return self._weights.seeds[self._choose(step)]

    def record_change(self, step: int, change: Tensor) -> None:
        self._weights.coefficients[self._choose(step)] += change
