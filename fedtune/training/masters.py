"""Single-precision copies of what is trained in a model of shorter numbers: the optimiser moves these.

A bfloat16 weight has eight significant bits, so a step smaller than 1/256 of it is rounded away, and most steps are.
The model is run in its own precision; each update goes to the copy, which is then rounded into the model. Trained
weights that are in single precision already are their own copies. Micikevicius et al., "Mixed Precision Training"
(arXiv 1710.03740), section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedtune.training.state import tensors_of

__all__ = ["Masters"]


@dataclass(frozen=True)
class Masters:
    """``copies`` of trained parameters by name, and in ``parameters`` what an optimiser moves, in the model's order."""

    model: nn.Module
    copies: Mapping[str, Parameter]
    parameters: list[Parameter]

    @classmethod
    def of(cls, model: nn.Module, state: Mapping[str, Tensor]) -> "Masters":
        """Copies start from ``state`` [fp32], of which the model holds what its precision can; else from the model."""
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        short = {name: one for name, one in trained.items() if one.dtype != torch.float32}
        copies = {name: Parameter(state.get(name, one.detach()).float().clone()) for name, one in short.items()}
        return cls(model, copies, [copies.get(name, one) for name, one in trained.items()])

    @torch.no_grad()
    def gather(self) -> None:
        """Hand the model's gradients on to the copies."""
        for name, copy in self.copies.items():
            parameter = self.model.get_parameter(name)
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """Round the copies into the model, and let go of all gradients."""
        for name, copy in self.copies.items():
            self.model.get_parameter(name).copy_(copy)
            copy.grad = None
        self.model.zero_grad()

    @torch.no_grad()
    def deltas(self, names: list[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each named tensor is beyond ``state`` [fp32]; made one after the other."""
        held = tensors_of(self.model)
        return {name: self._delta(name, held[name], state[name]) for name in names}

    def _delta(self, name: str, held: Tensor, before: Tensor) -> Tensor:
        if name in self.copies:
            return self.copies[name].detach() - before
        return held.detach().float() - before.to(held.dtype).float()  # a short buffer began as what it could hold

    def read(self, name: str) -> Tensor:
        """A named tensor as it is now, fp32."""
        held = self.copies[name] if name in self.copies else tensors_of(self.model)[name]
        return held.detach().to(torch.float32, copy=True)
