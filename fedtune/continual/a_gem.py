"""Averaged gradient episodic memory (A-GEM): no step may raise the loss on stored examples, to first order.

What: the device keeps a sample of its examples. In later tasks, each step computes the gradient of the loss on a batch
of them. If the step's own gradient points against it, the part that does so is taken away.
Stores: as ``replay``.
Costs: a second forward and backward pass of as many examples in each step, and one more gradient in memory. Nothing
more is sent.
Use when: as a reference. With the same examples, ``replay`` forgets less.
Avoid when: AdamW is used and the guarantee matters: it scales the changed gradient afterwards, which may turn it back.
Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (arXiv 1812.00420), equation 11. Deviations: the
sample is that of the smallest hashes; the gradient is changed before clipping and weight decay.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune.continual._method import MethodRound, MethodSetup
from fedtune.continual._rehearsal import Rehearsal, open_memory
from fedtune.continual._rehearsal_round import RehearsalRound

__all__ = ["AGem", "project_gradients"]


class AGem(Rehearsal):
    """Keep gradients from pointing against those of stored examples."""

    name: ClassVar[str] = "a-gem"

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Read the stored examples."""
        return _AGemRound(setup, open_memory(self, setup), self.name)


class _AGemRound(RehearsalRound):
    def change_gradients(self) -> None:
        """Project the gradients of the step."""
        if self.examples is not None:
            trained = {name: one for name, one in self.setup.model.named_parameters() if one.requires_grad}
            project_gradients(trained, self._compute_reference(trained))
        super().change_gradients()

    def _compute_reference(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the gradients of the loss on a draw. Those of the step stay as they are."""
        own = {name: one.grad for name, one in trained.items()}
        for one in trained.values():
            one.grad = None
        for part in self.iter_parts(self.examples, self.draw("examples", self.examples)):
            (part.share * part.loss).backward()
        found = {name: one.grad for name, one in trained.items() if one.grad is not None}
        for name, one in trained.items():
            one.grad = own[name]
        return found


def project_gradients(trained: Mapping[str, nn.Parameter], reference: Mapping[str, Tensor]) -> None:
    """Take from the gradients their part along ``reference`` if it is negative."""
    pairs = [(one.grad, reference[name]) for name, one in trained.items() if one.grad is not None and name in reference]
    along = sum(float(torch.vdot(own.flatten().double(), other.flatten().double())) for own, other in pairs)
    length = sum(float(other.double().square().sum()) for other in reference.values())
    if along < 0 < length:
        for name, one in trained.items():
            if name in reference:
                change = reference[name] * (-along / length)
                one.grad = change if one.grad is None else one.grad + change
