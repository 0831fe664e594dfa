"""AIM: activation-informed merging; input channels that are active in the base keep more of the base.

What: a merged delta of a weight is multiplied column by column by c_j = 1 - (1 - omega) s_j, s_j being the mean |x| of
input channel j in the base over the largest of its layer: the most active channel keeps ``omega`` of its update, a dead
one all of it. Linear and convolution weights and, as published, weights of norms; embeddings, whatever is tied to one,
biases and buffers stay as merged. The experts are not needed, only the base and some text.
Memory: one vector per weight. In a federation the statistics cost a forward pass over ``max_examples`` texts a round.
Sends: with ``measured_by: clients`` one number per input channel of each weight that is trained in the round, so about
1 / (output channels) of a dense update, but 1 / rank of an adapter in a round that trains A.
Use when: the merge moved too far, as sums of several task vectors do (weight 1 each): there the paper gains most.
Measured here over three seeds at omega 0.4 (benchmarks/aim.py): on sums of three SmolLM2 fine-tunes 0.33 less loss than
``shrink`` on their own domains, 0.02 with TIES, and in all merges less loss on text nobody was tuned on.
Avoid when: the merge is a mean near its clients: there 0.04 more loss than ``shrink``, and in a federation of full
fine-tuning no difference (benchmarks/aim_federation.py). Always see ``shrink`` beside it: part of what AIM does is a
smaller step. Where one channel outshines all others (massive activations of language models) s is near zero elsewhere
and AIM does next to nothing there; ``peak_quantile`` below 1 lowers the bar.
Adapters: (B A) diag(c) = B (A diag(c)), so an adapter keeps its rank, and in a round that trains A alone (B common)
scaling the delta of A is exact. In a round that trains B alone (A common) no change of B can scale columns of the
product: B stays as merged, so alternating factors are relaxed every second round and ``freeze-a`` not at all (refused
where nothing else is scaled). With both trained, delta = B1 A1 - B0 A0, the part (B1 - B0) A0 stays unrelaxed: exact
only where B0 = 0; where the product is folded into the base weight, scaling that weight's delta is exact again.
Source: Alizadeh Nobari et al., "Activation-Informed Merging of Large Language Models" (arXiv 2502.02421) and the
authors' code, omega 0.4. Ours: statistics, delta and scale in fp32 or better with one cast at the end (they: bf16
throughout); padding does not count; a tied output layer counts as an embedding (theirs changes both); convolutions have
one s per input channel, of its own group where they are grouped; LoRA's B, whose input is no channel, is left alone.
"""

from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._by_activity import ActivationRelaxStep, broadcast_scale_to_rows, compute_channel_scale
from fedtune.merging._step import ActivationStatistics, MergeContext

__all__ = ["Aim", "scale_adapter_columns"]


@final
class Aim(ActivationRelaxStep):
    """Columns scaled by how quiet their input is."""

    name: ClassVar[str] = "aim"

    @property
    def needs(self) -> frozenset[str]:
        """The activity of input channels."""
        return frozenset({"activity"})

    def relax(self, name: str, start: int, delta: Tensor, evidence: MergeContext) -> Tensor:
        """The rows with each column multiplied by c."""
        found = self.compute_scale(name, delta, evidence)
        return delta if found is None else delta * broadcast_scale_to_rows(*found, start, delta)


def scale_adapter_columns(
    factor: Tensor, activity: ActivationStatistics, omega: float, quantile: float = 1.0
) -> Tensor:
    """A diag(c) of an adapter's A [rank, in, ...] whose product with B is the whole delta.

    ``activity`` is of the layer the adapter stands beside, whose input is A's too.
    """
    return factor * broadcast_scale_to_rows(compute_channel_scale(activity, omega, quantile), 1, 0, factor)
