"""LoRA: train a low-rank pair B A beside each frozen linear layer, with exact aggregation.

What: y = W x + (alpha / rank) B A x, where W is frozen and B is zero at the start. A classifier's new head is trained
too.
Saves: the gradients and optimiser state of W, and the inputs of W that only its own gradient needs.
Sends: rank (in + out) numbers per layer down. Up, only the factor trained in that round is sent, about half.
Exactness: by default, clients train B in odd rounds and A in even rounds, while the other factor is the same on all
clients. The weighted mean of their updates then equals the weighted mean of their products. Each round changes one
factor only. The best learning rate was three times that of LoRA with both factors on MiniLM, and the same on SmolLM2,
so search it. ``trained_factors: b-only`` never trains A: cheaper, but with less capacity. ``trained_factors: both``
trains both factors, for merges of pairs: ``fedit``, ``flexlora``, ``hetlora``. After as many rounds it was slightly
better in our comparison, for twice the bytes up. ``trained_factors: both-and-base`` also shares the base weights, for
merges that change them: ``fedex-lora``, ``flora``. The server sends these changes as low-rank increments.
Use when: all of the model should adapt and the uplink is slow. This is the default choice.
Avoid when: activations need too much memory (add ``gradient-checkpointing``), or weights do (use ``qlora``). Linear
layers and point-wise convolutions get pairs. Experts stored as one tensor, other convolutions and Mamba's ``out_proj``
stay frozen. fedtune prints a notice if these are more than a twentieth of the weights.
Source: Hu et al., "LoRA" (arXiv 2106.09685), equation 3. Alternation: Chen et al., "Robust Federated Finetuning of LLMs
via Alternating Optimization of LoRA" (RoLoRA, arXiv 2502.01755). Freezing A: Sun et al., "Improving LoRA in
Privacy-preserving Federated Learning" (FFA-LoRA, arXiv 2403.12313).
"""

from collections.abc import Mapping
from typing import ClassVar

from fedtune.techniques.low_rank._low_rank import LowRankTechnique

__all__ = ["Lora"]


class Lora(LowRankTechnique):
    """A low-rank pair beside full-precision layers."""

    name: ClassVar[str] = "lora"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "head-only": "the head is already trained with the low-rank pairs",
        "full": "full trains the weights that lora freezes",
        "qlora": "both add a low-rank pair to the same layers",
    }
