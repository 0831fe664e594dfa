"""How far a client's SGD would go along a gradient that stays the same."""

__all__ = ["StepLengths"]


class StepLengths:
    """Adds up the distance that SGD moves along a gradient of one: the sum of the learning rates without momentum.

    In the words of FedNova, the total divided by the learning rate is the norm of the accumulation vector a_i.
    """

    def __init__(self, momentum: float, *, nesterov: bool) -> None:
        self._momentum, self._nesterov = momentum, nesterov
        self._velocity, self.total = 0.0, 0.0

    def add_step(self, lr: float) -> None:
        """Count a step."""
        self._velocity = self._momentum * self._velocity + 1.0
        self.total += lr * (1.0 + self._momentum * self._velocity if self._nesterov else self._velocity)
