"""Ditto: each client trains a model of its own, which is drawn to the shared one.

What: the shared model is trained and merged as without it. Beside it, client k trains v_k: each step follows the
gradient at v_k plus lambda (v_k - w_t), where w_t is the received state. v_k begins as the state that the client
receives in its first round.
Sends: nothing more. v_k rests on the device, in a file beside what it keeps of the run; a device that was away finds
its own again. A round takes twice the steps, and training holds three more copies of what is trained and the
optimiser's moments of v_k.
Scores: ``before`` and ``after`` of a client are those of its own model, and ``shared`` those of the shared one.
Use when: clients differ, and those that join late should have a good model at once: the shared one is whole, so that
the server scores and exports it.
Avoid when: devices have no time or memory for a second model. A large lambda gives the shared model, zero one that the
client trains alone; search it between 0.01 and 2.
Settings: learning rate, steps and clipping are those of ``train``, for both models.
Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization" (arXiv 2012.04221), equation 1
and Algorithm 1. There, v_k may begin anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup, RoundEnd, Tensors
from fedtune.algorithms._own_values import OwnValues
from fedtune.algorithms._parameters import copy_parameters
from fedtune.algorithms._personal_model import PersonalModel, clip_gradients, swap_values

__all__ = ["Ditto"]


class Ditto(Algorithm):
    """Trains a second model with a proximal term."""

    name: ClassVar[str] = "ditto"
    copies: ClassVar[int] = 6
    remembers: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    has_personal_model: ClassVar[bool] = True
    lam: float = Field(0.1, ge=0, description="lambda, the strength of the pull to the received state")

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Read v_k, and keep the received values."""
        return _DittoRound(self.lam, setup)

    def describe_export(self) -> str:
        """Return which model it is."""
        return "This is the shared model. Each device keeps its own one beside it.\n"


class _DittoRound(AlgorithmRound):
    def __init__(self, lam: float, setup: AlgorithmSetup) -> None:
        self._own = OwnValues(setup)
        self.personal = _DittoModel(lam, setup, self._own)

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Store v_k."""
        return RoundEnd({}, self._own.list_stored())


class _DittoModel(PersonalModel):
    def __init__(self, lam: float, setup: AlgorithmSetup, own: OwnValues) -> None:
        self._lam, self._setup, self._own = lam, setup, own
        self._start: dict[str, Tensor] = copy_parameters(setup.parameters)
        self._optimiser = setup.make_optimiser(own.list_trained())

    @contextmanager
    def use_values(self) -> Iterator[None]:
        """Put v_k in the place of the shared values."""
        with swap_values(self._own.tensors, self._own.values):
            yield
            self._own.read_statistics()

    def take_step(self, lr: float) -> None:
        """Follow the gradient plus lambda (v_k - w_t)."""
        for name, parameter in self._setup.parameters.items():
            own = self._own.trained[name]
            own.grad = _add_pull(parameter, own, self._start[name], self._lam)
        clip_gradients(self._own.list_trained(), self._setup.recipe.train.max_grad_norm)
        self._optimiser.step(lr)


def _add_pull(parameter: nn.Parameter, own: Tensor, start: Tensor, lam: float) -> Tensor:
    pull = lam * (own.detach() - start.to(own.dtype))
    return pull if parameter.grad is None else parameter.grad.to(own.dtype) + pull
