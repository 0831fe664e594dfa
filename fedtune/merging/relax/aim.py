"""AIM: activation-informed merging, which keeps more of the base in the input channels that are active in the base.

What: a merged delta is multiplied, column by column, by c_j = 1 - (1 - omega) s_j. The activity s_j is the mean |x| of
input channel j in the base, divided by the largest of its layer. The most active channel keeps ``omega`` of its update,
and a dead channel keeps all of it. AIM scales linear and convolution weights and, as published, weights of norms.
Embeddings, weights tied to one, biases and buffers stay as merged. AIM needs only the base and some text, not the
fine-tuned models.
Memory: one vector per weight. In a federation, the statistics cost a forward pass over ``max_examples`` texts per
round.
Sends: with ``measured_by: clients``, one number per input channel of each weight trained in the round. This is about 1
/ (output channels) of a dense update, but 1 / rank of an adapter in a round that trains A.
Use when: the merge moved too far from the base, as sums of several task vectors do (weight 1 each); the paper gains
most there. Measured here over three seeds at omega 0.4 (benchmarks/aim.py): on sums of three SmolLM2 fine-tunes, AIM
has 0.33 less loss than ``shrink`` on their own domains, and 0.02 less with TIES. All merges have less loss on text that
no model was fine-tuned on.
Avoid when: the merge is a mean of clients that stay close. There AIM has 0.04 more loss than ``shrink``, and in a
federation of full fine-tuning it makes no difference (benchmarks/aim_federation.py). Always compare with ``shrink``,
because part of AIM's effect is a smaller step. If one channel is far more active than the others (massive activations
of language models), s is near zero elsewhere and AIM has almost no effect there; set ``peak_quantile`` below 1.
Tasks: in ``stream.consolidate``, the change of a whole task is scaled, and s is that of all earlier tasks, whose
clients sent sums once. Measured on a class stream of digits, three seeds (benchmarks/continual_merges.py): less is
forgotten because less is learned, as with ``average``, and the naive stream ends highest. At equal mean factors AIM
ends 0 to 3 points above ``shrink``, as much as it learns more: it is no better trade.
Adapters: AIM scales columns of the product, and (B A) diag(c) = B (A diag(c)), so the rank stays the same. In a round
that trains A alone, scaling the delta of A is exact. In a round that trains B alone, no change of B can scale the
columns of the product, so B is merged without AIM. Alternating LoRA is therefore relaxed every second round. ``b-only``
is never relaxed; the recipe is refused if AIM would scale nothing else. When both factors are trained, delta = B1 A1 -
B0 A0, and its part (B1 - B0) A0 is not relaxed, so AIM is exact only if B0 = 0. When the product is merged into the
base weight, scaling the delta of that weight is exact.
Source: Alizadeh Nobari et al., "Activation-Informed Merging of Large Language Models" (arXiv 2502.02421) and the
authors' code, omega 0.4. Ours: statistics, delta and scale are in fp32 or better, with one cast at the end (theirs:
bf16 throughout). Padding does not count. A tied output layer counts as an embedding (theirs changes both). Convolutions
have one s per input channel, within its group if they are grouped. LoRA's B is not scaled, because its input is not a
channel.
"""

from typing import ClassVar, final

from torch import Tensor

from fedtune.merging._step import ActivationStatistics, MergeContext
from fedtune.merging.relax._activation_step import ActivationRelaxStep, broadcast_scale_to_rows, compute_channel_scale

__all__ = ["Aim", "scale_adapter_columns"]


@final
class Aim(ActivationRelaxStep):
    """Scales columns by the activity of their input channels."""

    name: ClassVar[str] = "aim"

    @property
    def needs(self) -> frozenset[str]:
        """The activation statistics."""
        return frozenset({"activity"})

    def relax(self, name: str, start: int, delta: Tensor, context: MergeContext) -> Tensor:
        """The rows with each column multiplied by c."""
        found = self.compute_scale(name, delta, context)
        return delta if found is None else delta * broadcast_scale_to_rows(*found, start, delta)


def scale_adapter_columns(
    factor: Tensor, activity: ActivationStatistics, omega: float, quantile: float = 1.0
) -> Tensor:
    """A diag(c) of an adapter's A [rank, in, ...] whose product with B is the whole delta.

    ``activity`` is of the layer the adapter stands beside, whose input is A's too.
    """
    return factor * broadcast_scale_to_rows(compute_channel_scale(activity, omega, quantile), 1, 0, factor)
