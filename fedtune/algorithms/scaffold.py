"""SCAFFOLD: control variates correct the drift of clients whose data differ.

What: each step follows g - c_i + c, where c_i is the client's own gradient as it was in its last round, and c the mean
of them. After the round, option 1 takes the gradient at the received state as the new c_i, from one more pass over the
client's examples; option 2 (the default) takes c_i - c + (x - y) / (sum of the learning rates), which is free. The
client sends by how much c_i changed, and the server adds 1/N of it to c for each client, N being all clients.
Sends: up, twice the trained tensors; down, twice. c_i rests on the device, in a file beside what it keeps of the run,
and c in the files of the run. A device reads the c_i of its last round whose update was merged, so that c remains the
mean of all c_i when updates are lost. Training holds two more copies of what is trained.
Weights: all clients count alike, as in the paper. ``fedavgm: {lr: 1, momentum: 0}`` after the
mean is the paper's global step size.
Use when: clients train many steps with SGD, differ much, and come back often. It then reaches the optimum of the mean
loss, where FedAvg stays at a distance that grows with the number of steps.
Avoid when: there are many more clients than rounds: c_i then are old or zero, and FedAvg is as good. Batch norms and
dropout add noise to c_i. Clipping of gradients acts on the corrected ones, which biases option 2. The bounds on
updates do not see variates, so devices must be trusted.
Adapters: variates are those of each factor as an entry of the model. With one factor per round, those of the other rest
and belong to an older partner.
Source: Karimireddy et al. (arXiv 1910.06378), Algorithm 1. Ours: with momentum, option 2 divides by the distance that
equal gradients would have moved, as FedNova does.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtune.algorithms._algorithm import (
    Algorithm,
    AlgorithmRound,
    AlgorithmSetup,
    MergedUpdates,
    RoundEnd,
    ServerResult,
    Shape,
    Tensors,
    read_upload,
)
from fedtune.algorithms._parameters import add_to_gradient, move_to_parameters
from fedtune.algorithms._received_gradient import compute_received_gradient
from fedtune.algorithms._step_lengths import StepLengths
from fedtune.wire.client_update import TensorSpec

__all__ = ["Scaffold"]


class Scaffold(Algorithm):
    """Corrects gradients by the difference between the mean gradient and the client's own."""

    name: ClassVar[str] = "scaffold"
    copies: ClassVar[int] = 3
    sends_more: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    fits_one_loss: ClassVar[bool] = True
    needs_one_start: ClassVar[bool] = True
    needs_sgd: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    weighs_equally: ClassVar[bool] = True
    option: Literal[1, 2] = Field(2, description="1: gradient at the received state; 2: mean gradient of the steps")

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Read both control variates, which are zero at first."""
        return _ScaffoldRound(self.option, setup)

    def declare_upload(self, parameters: Mapping[str, Shape]) -> dict[str, TensorSpec]:
        """The change of each control variate."""
        return {name: TensorSpec(shape) for name, shape in parameters.items()}

    def after_merge(self, merged: MergedUpdates) -> ServerResult:
        """Add 1/N of each change to the server's control variate."""
        memory = dict(merged.memory)
        for name, shape in merged.parameters.items():
            total = torch.zeros(shape, dtype=torch.float64)
            for update in merged.updates:
                total += read_upload(self.name, update, name).double()
            before = memory.get(name, torch.zeros(shape)).double()
            memory[name] = (before + total / merged.num_clients).to(merged.after[name].dtype)
        return ServerResult(merged.after, memory)

    def list_sent_memory(self, memory: Tensors, parameters: Sequence[str]) -> list[str]:
        """The control variates of what is trained."""
        return [name for name in parameters if name in memory]


class _ScaffoldRound(AlgorithmRound):
    def __init__(self, option: Literal[1, 2], setup: AlgorithmSetup) -> None:
        self._setup, train = setup, setup.recipe.train
        self._own = move_to_parameters(setup.stored, setup.parameters)
        self._common = move_to_parameters(setup.received, setup.parameters)
        self._lengths = StepLengths(train.momentum, nesterov=train.nesterov)
        self._gradient = compute_received_gradient(setup) if option == 1 else None

    def change_gradients(self) -> None:
        """Add c - c_i."""
        for name, parameter in self._setup.parameters.items():
            add_to_gradient(parameter, self._common[name] - self._own[name])

    def record_step(self, lr: float) -> None:
        """Count the step."""
        self._lengths.add_step(lr)

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Return the change of c_i, and the new one; variates of tensors that were not trained rest."""
        changes = {name: self._compute_change(name, delta[name]) for name in self._setup.parameters}
        stored = self._setup.stored  # in fp32, also where the model is not
        own = {name: stored[name] + change if name in stored else change for name, change in changes.items()}
        return RoundEnd(changes, {**stored, **own})

    def _compute_change(self, name: str, delta: Tensor) -> Tensor:
        if self._gradient is not None:
            return self._gradient[name].cpu().to(delta.dtype) - self._get_own(name, delta)
        if not self._lengths.total:  # a learning rate of zero, e.g. in the first step of a warm-up
            return torch.zeros_like(delta)
        received = self._setup.received
        change = -delta / self._lengths.total
        return change - received[name] if name in received else change

    def _get_own(self, name: str, like: Tensor) -> Tensor:
        return self._setup.stored.get(name, torch.zeros_like(like))
