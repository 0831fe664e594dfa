"""LoRA: a trained low-rank pair B A beside each frozen linear layer, aggregated exactly.

What: y = W x + (alpha / rank) B A x with W frozen, B zero at the start; a classifier's new head is trained too.
Saves: gradients and optimiser state of W, and the inputs of W that only its own gradient needs.
Sends: rank (in + out) numbers per layer down, and up only the factor trained in that round, about half.
Exactness: by default clients train B in odd rounds and A in even ones, the other factor being common, so the weighted
mean of what they send is the weighted mean of their products. Each round moves one factor alone, and wants about three
times the learning rate that LoRA with both factors takes. ``trained_factors: b-only`` never trains A: cheaper, less
capacity. ``trained_factors: both`` trains both, for merges of pairs: ``fedit``, ``flexlora``, ``hetlora``.
``trained_factors: both-and-base`` also shares the base weights, for merges that write into them:
``fedex-lora``, ``flora``; what is added to these weights goes down as low-rank increments.
Use when: the model is worth adapting throughout and the uplink is narrow: the default choice.
Avoid when: activations are the problem: add ``gradient-checkpointing``; or weights are: take ``qlora``. Pairs stand
beside linear layers and point-wise convolutions: experts that are one tensor, other convolutions and Mamba's
``out_proj`` stay frozen, which is said where they are more than a twentieth of the weights.
Source: Hu et al., "LoRA" (arXiv 2106.09685), equation 3; alternation: Chen et al., "Robust Federated Finetuning of LLMs
via Alternating Optimization of LoRA" (RoLoRA, arXiv 2502.01755); freezing A: Sun et al., "Improving LoRA in
Privacy-preserving Federated Learning" (FFA-LoRA, arXiv 2403.12313).
"""

from collections.abc import Mapping
from typing import ClassVar

from fedtune.techniques._low_rank import LowRankTechnique

__all__ = ["Lora"]


class Lora(LowRankTechnique):
    """A low-rank pair beside full-precision layers."""

    name: ClassVar[str] = "lora"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "head-only": "the head is trained beside a low-rank pair anyway",
        "full": "full trains the weights that lora freezes",
        "qlora": "both put a low-rank pair beside the same layers",
    }
