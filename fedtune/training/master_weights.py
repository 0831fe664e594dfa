"""fp32 master weights for parameters that are trained in lower precision.

An update of a bfloat16 weight is lost if it is smaller than half the distance to the next number, at most 1/256 of the
weight. Therefore the optimiser updates fp32 copies, which are rounded into the model after each step (Micikevicius et
al. 2018, section 3.1). They exist for one round only, because states that are sent and stored are fp32.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedtune.recipe.schema import Train
from fedtune.training.optimisers import LocalOptimiser, make_optimiser
from fedtune.training.start import Start

__all__ = ["make_stepper", "masters_of"]


def masters_of(model: nn.Module, start: Start) -> dict[str, nn.Parameter]:
    """Return an fp32 copy of every trained parameter of lower precision, by name, with the values of ``start``."""
    coarse = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
    }
    return {
        name: nn.Parameter(start[name].to(parameter.device, copy=True) if name in start else parameter.detach().float())
        for name, parameter in coarse.items()
    }


def make_stepper(settings: Train, model: nn.Module, masters: Mapping[str, nn.Parameter]) -> LocalOptimiser:
    """Return a new optimiser over the trained parameters. It updates those in ``masters`` through their copies."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = make_optimiser(settings, [masters.get(name, parameter) for name, parameter in named.items()])
    pairs = [(named[name], master) for name, master in masters.items()]
    return _Mastered(inner, pairs) if pairs else inner


class _Mastered:
    """Updates master weights with the gradients of their parameters, and rounds them into the parameters."""

    def __init__(self, inner: LocalOptimiser, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self._inner, self._pairs = inner, pairs

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""
        moved = [(parameter, master) for parameter, master in self._pairs if parameter.grad is not None]
        for parameter, master in moved:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._inner.step(lr)
        for parameter, master in moved:
            master.grad = None
            parameter.copy_(master)
