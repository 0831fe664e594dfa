"""FedLC: the logits of a client's rare classes are lowered while it trains, so that it learns them by a wider margin.

What: the cross-entropy is that of the logits f_c - tau n_c^(-1/4), where n_c is the number of the client's examples of
class c. Classes that the client lacks count as n_c = 1e-8, so that their logits fall by 100 tau and hardly any gradient
reaches their rows of the head: they are not unlearnt. Scores and predictions use the plain logits.
Sends: nothing. Nothing is kept.
Use when: clients hold few classes, or very unequal numbers of them, and train many steps.
Avoid when: examples of clients are balanced, where all logits fall by the same and nothing changes. Large n make the
margins alike: at 10, 100 and 1,000 examples they are 0.56, 0.32 and 0.18 tau.
Source: Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration" (arXiv 2209.00189). Ours:
the denominator sums over all classes, as in the usual implementations, because without the true class the loss has no
lower bound.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtune.accelerator import find_device
from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup
from fedtune.algorithms._classifiers import count_classes, find_last_layer, require_classes
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe

__all__ = ["Fedlc", "compute_margins"]

_ABSENT = 1e-8
"""The number of examples that a class without any counts as."""


class Fedlc(Algorithm):
    """Lowers logits by the rarity of their class on the client."""

    name: ClassVar[str] = "fedlc"
    tau: float = Field(1.0, ge=0, description="strength of the margins; 0: none")

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError for tasks without classes."""
        require_classes(self.name, recipe)

    def check_model(self, model: nn.Module) -> None:
        """Raise ModelError unless the model ends in a linear layer."""
        find_last_layer(self.name, model)

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Count the client's examples of each class."""
        return _FedlcRound(self, setup)


class _FedlcRound(AlgorithmRound):
    def __init__(self, method: Fedlc, setup: AlgorithmSetup) -> None:
        self._layer = find_last_layer(method.name, setup.model)
        counts = count_classes(setup.examples, setup.rows, self._layer.out_features)
        self._margins = compute_margins(counts, method.tau).to(find_device(setup.model))

    @contextmanager
    def change_model(self) -> Iterator[None]:
        """Lower the logits."""

        def lower_logits(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
            return logits - self._margins.to(logits.dtype)

        handle = self._layer.register_forward_hook(lower_logits)
        try:
            yield
        finally:
            handle.remove()


def compute_margins(counts: Tensor, tau: float) -> Tensor:
    """Return tau n_c^(-1/4) for each class."""
    return tau * counts.double().clamp(min=_ABSENT) ** -0.25
