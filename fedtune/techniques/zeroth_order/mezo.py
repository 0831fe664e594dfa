"""MeZO: train without a backward pass, by the slope of the loss along a random direction.

What: a step runs the model twice on its batch, with weights w + eps z and w - eps z. The difference of the two losses
over 2 eps is the slope along z, and SGD moves w against it along z. z has one normal number per trained weight. It is
drawn again from its seed whenever it is needed, so that it is never held as a whole. Weights move in place. Dropout
draws the same masks in both passes.
Saves: all activations, gradients and optimiser state. A step needs the memory of inference, and 1 MB.
Sends: what the other technique sends.
Costs: steps. The estimate has the variance of the gradient times the number of trained weights d, so that the bound for
a general loss needs d times as many steps as SGD; the paper argues for the effective rank of the loss instead, and
trains for 20,000 to 100,000 steps where fine-tuning takes 1,000. One step costs two forward passes, and d normal
numbers four times over.
Exactness: the expectation over z is the gradient up to eps^2. A step returns in place to w with a rounding of at most
3 * 2^-24 * (|w| + eps |z|) per weight in single precision, and exactly for weights with master copies (bfloat16).
Use when: memory allows inference and not more, many steps are cheap, and the model is pretrained on a similar task.
Avoid when: a backward pass with ``gradient-checkpointing`` fits. It reaches the same loss in far fewer steps.
Settings: the more weights are trained, the smaller the rate; search it from 1e-6 with ``full`` and 1e-3 with LoRA. Only
plain SGD is possible: set ``optimiser: sgd``. eps below 1e-4 loses the difference of losses in rounding, and so does a
loss in half precision, which is refused.
Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), Algorithm 1 with
n = 1. Deviations: dropout stays on, with equal masks, where the authors' code switches it off. The directions are those
of a generator on the CPU, and are the same on all devices.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtune.seeds import derive_seed
from fedtune.techniques._technique import Technique
from fedtune.techniques.zeroth_order._directions import list_trained_tensors
from fedtune.techniques.zeroth_order._projected_gradient import ProjectedGradientStep, find_gradient_conflict

__all__ = ["Mezo"]


class Mezo(Technique):
    """Take steps along random directions by the slope of the loss."""

    name: ClassVar[str] = "mezo"
    selects_trainable_tensors: ClassVar[bool] = False
    has_exact_gradients: ClassVar[bool] = False
    estimates_gradients: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    allows_kv_cache: ClassVar[bool] = True

    epsilon: float = Field(1e-3, gt=0, description="how far the weights are moved along a direction, in each sense")

    def find_conflict(self, other: Technique) -> str | None:
        """Refuse techniques that change gradients, or what a backward pass keeps."""
        return find_gradient_conflict(self, other)

    def make_step_estimator(
        self, model: nn.Module, masters: Mapping[str, nn.Parameter], seed: int
    ) -> ProjectedGradientStep:
        """Return the steps of a round, each with a direction of its own."""
        return ProjectedGradientStep(list_trained_tensors(model, masters), self.epsilon, _NewDirections(seed))


class _NewDirections:
    """A new direction for each step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def get_seed(self, step: int) -> int:
        return derive_seed(self._seed, step)

    def record_change(self, step: int, change: Tensor) -> None:
        pass
