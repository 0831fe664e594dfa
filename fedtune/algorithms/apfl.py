"""APFL: each client uses a mix of its own model and of the shared one.

What: client i trains the shared w_i as without it, and v_i beside it, so that the mix alpha v_i + (1 - alpha) w_i is
good. Each step moves v_i by alpha times the gradient at the mix, and then w_i by its own gradient. With ``adaptive``,
alpha moves too, by <v_i - w_i, gradient at the mix>, and stays between 0 and 1. v_i begins as the state that the client
receives in its first round.
Sends: nothing more. v_i and alpha rest on the device, in a file beside what it keeps of the run; a device that was away
finds its own again. A round takes twice the steps, and training holds three more copies of what is trained and the
optimiser's moments of v_i.
Scores: ``before`` and ``after`` of a client are those of its mix, and ``shared`` those of the shared model.
Use when: it is unknown how much clients differ: alpha says so, 0 for the shared model alone and 1 for the own one.
Avoid when: devices have no time or memory for a second model. v_i follows alpha times the gradient, so that a small
alpha trains it slowly; alpha 0 never does.
Settings: learning rate, steps and clipping are those of ``train``, for both models; alpha is not clipped.
Source: Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning" (arXiv 2003.13461), Algorithm 1, and
equation 10 for alpha, here in every step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup, RoundEnd, Tensors
from fedtune.algorithms._own_values import OwnValues
from fedtune.algorithms._personal_model import PersonalModel, clip_gradients, copy_in_single_precision, swap_values

__all__ = ["Apfl"]

_ALPHA = "alpha"


class Apfl(Algorithm):
    """Mixes an own model with the shared one."""

    name: ClassVar[str] = "apfl"
    copies: ClassVar[int] = 6
    remembers: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    has_personal_model: ClassVar[bool] = True
    alpha: float = Field(0.5, gt=0, le=1, description="share of the own model in the mix")
    adaptive: bool = Field(False, description="let each client train alpha")

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Read v_i and alpha."""
        return _ApflRound(self, setup)

    def describe_export(self) -> str:
        """Return which model it is."""
        return "This is the shared model. Each device keeps its own one beside it, and uses a mix of both.\n"


class _ApflRound(AlgorithmRound):
    def __init__(self, method: Apfl, setup: AlgorithmSetup) -> None:
        self._own = OwnValues(setup)
        self._mix = _Mix(method, setup, self._own)
        self.personal = self._mix

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Store v_i and alpha."""
        return RoundEnd({}, {**self._own.list_stored(), _ALPHA: torch.tensor([self._mix.alpha], dtype=torch.float64)})


class _Mix(PersonalModel):
    def __init__(self, method: Apfl, setup: AlgorithmSetup, own: OwnValues) -> None:
        self._method, self._setup, self._own = method, setup, own
        self.alpha = float(setup.stored[_ALPHA]) if _ALPHA in setup.stored else method.alpha
        self._optimiser = setup.make_optimiser(own.list_trained())
        self._shared: Mapping[str, Tensor] = {}

    @contextmanager
    def use_values(self) -> Iterator[None]:
        """Put the mix in the place of the shared values; running statistics are the own ones."""
        own, statistics = self._own.values, self._setup.statistics
        self._shared = {name: copy_in_single_precision(self._own.tensors[name]) for name in own}
        mixed = {
            name: one if name in statistics else self.alpha * one + (1 - self.alpha) * self._shared[name]
            for name, one in own.items()
        }
        with swap_values(self._own.tensors, mixed):
            yield
            self._own.read_statistics()

    def take_step(self, lr: float) -> None:
        """Move v_i, and alpha if it is adaptive, both by the gradients at the same point."""
        slope = 0.0
        for name, parameter in self._setup.parameters.items():
            own = self._own.trained[name]
            gradient = None if parameter.grad is None else parameter.grad.to(own.dtype)
            own.grad = None if gradient is None else self.alpha * gradient
            if gradient is not None and self._method.adaptive:
                slope += float(((own.detach() - self._shared[name]) * gradient).sum(dtype=torch.float64))
        clip_gradients(self._own.list_trained(), self._setup.recipe.train.max_grad_norm)
        self._optimiser.step(lr)
        self.alpha = min(1.0, max(0.0, self.alpha - lr * slope))
