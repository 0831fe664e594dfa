"""FedNova: updates are divided by the number of steps that they took, so that no client counts for its speed.

What: client i moves by Delta_i in steps that would have moved a_i along an equal gradient, which is their number times
the learning rate for plain SGD. The merged change is a_eff sum_i p_i Delta_i / a_i with a_eff = sum_i p_i a_i and p_i
the client's share of the examples. The server scales each update by a_eff / a_i, and the merge weighs it as always.
Sends: up, one number more. Nothing is kept.
Use when: clients take different numbers of steps: with ``train.local_epochs`` and different amounts of data, or device
classes with other batch sizes. With equal numbers it is FedAvg.
Avoid when: the optimiser is adaptive (refused), or devices are not trusted: a device states its own a_i, and a small
one makes its update count more. ``federation.norm_bound`` sees updates before they are scaled.
Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (arXiv
2007.07481), with momentum as there. Learning rates that change during a round count in a_i.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from fedtune.algorithms._algorithm import (
    Algorithm,
    AlgorithmRound,
    AlgorithmSetup,
    RoundEnd,
    Shape,
    Tensors,
    Weighing,
    read_upload,
)
from fedtune.algorithms._step_lengths import StepLengths
from fedtune.wire.client_update import TensorSpec

__all__ = ["Fednova"]

_LENGTH = "length"
_MOST = 1e4
"""No update is scaled by more, whatever length a device states."""


class Fednova(Algorithm):
    """Normalises updates by the lengths of their paths."""

    name: ClassVar[str] = "fednova"
    sends_more: ClassVar[bool] = True
    needs_sgd: ClassVar[bool] = True

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Count the steps."""
        return _FednovaRound(setup)

    def declare_upload(self, parameters: Mapping[str, Shape]) -> dict[str, TensorSpec]:
        """The length of the client's path."""
        return {_LENGTH: TensorSpec((1,), negative=False)}

    def compute_scales(self, weighing: Weighing) -> list[float]:
        """Return a_eff / a_i; one for a client that did not move."""
        lengths = [float(read_upload(self.name, update, _LENGTH)) for update in weighing.updates]
        effective = sum(weight * length for weight, length in zip(weighing.weights, lengths, strict=True))
        return [min(effective / length, _MOST) if length else 1.0 for length in lengths]


class _FednovaRound(AlgorithmRound):
    def __init__(self, setup: AlgorithmSetup) -> None:
        train = setup.recipe.train
        self._lengths = StepLengths(train.momentum, nesterov=train.nesterov)

    def record_step(self, lr: float) -> None:
        """Count the step."""
        self._lengths.add_step(lr)

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Return the length."""
        return RoundEnd({_LENGTH: torch.tensor([self._lengths.total], dtype=torch.float64)})
