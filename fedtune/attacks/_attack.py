"""The base class of attacks, which only simulated clients make, and the values that they receive."""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from fedtune.recipe.unit_registry import NamedUnit

__all__ = ["Attack", "AttackedTensor"]


class AttackedTensor(NamedTuple):
    """One tensor of an attacker's update before the attack.

    ``allied`` are the deltas that all attackers of its device class trained in this round, its own among them.
    ``num_updates`` counts the updates of the round, those of honest clients too. ``seed`` is that of this client, round
    and tensor.
    """

    delta: Tensor
    allied: Sequence[Tensor]
    num_updates: int
    seed: int


class Attack(NamedUnit, ABC):
    """What a hostile client does. Its fields are its settings; both hooks are optional."""

    changes_labels: ClassVar[bool] = False
    """Whether the client trains on other labels than it has."""

    def change_labels(self, labels: Tensor, num_labels: int) -> Tensor:
        """Return the labels [n] that the client trains on."""
        return labels

    def change_delta(self, tensor: AttackedTensor) -> Tensor:
        """Return the delta that the client sends, of the same shape. It is pure."""
        return tensor.delta
