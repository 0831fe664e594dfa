"""FedProx: a client is held near the state that it received.

What: the loss gains mu / 2 ||w - w_t||^2, so that the gradient of each step gains mu (w - w_t). w_t is the received
state of this round.
Sends: nothing more. Devices keep nothing; training holds one more copy of what is trained.
Use when: clients train long, or differ, and their updates point apart. It is the cheapest correction.
Avoid when: clients take one or two steps, where the term is still zero or nearly so, or when a slow start matters: a
large mu is a smaller step. It lessens the drift of clients and does not remove it; ``scaffold`` and ``feddyn`` do.
Settings: mu between 0.001 and 1; the product of learning rate and mu must stay below 1. The paper also lets devices
stop early, which is ``federation.deadline`` and local epochs here.
Source: Li et al., "Federated Optimization in Heterogeneous Networks" (arXiv 1812.06127), equation 2 and Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup
from fedtune.algorithms._parameters import add_to_gradient, copy_parameters

__all__ = ["Fedprox"]


class Fedprox(Algorithm):
    """Adds a proximal term to the loss of clients."""

    name: ClassVar[str] = "fedprox"
    copies: ClassVar[int] = 1
    changes_gradients: ClassVar[bool] = True
    mu: float = Field(0.01, ge=0, description="strength of the pull to the received state")

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Keep the received values."""
        return _FedproxRound(self.mu, setup)


class _FedproxRound(AlgorithmRound):
    def __init__(self, mu: float, setup: AlgorithmSetup) -> None:
        self._mu, self._parameters = mu, setup.parameters
        self._start = copy_parameters(setup.parameters)

    def change_gradients(self) -> None:
        """Add mu (w - w_t)."""
        for name, parameter in self._parameters.items():
            add_to_gradient(parameter, self._mu * (parameter.detach() - self._start[name]))
