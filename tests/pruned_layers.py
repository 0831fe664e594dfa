"""Layers of every kind whose inputs may be pruned, and a step through one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques.pruning._pruned_input_layers import InputStorage, RecentInputs, attach_input_pruning
from fedtune.techniques.pruning._pruned_tensor import PruningRule

__all__ = ["CASES", "CONVOLUTIONS", "LINEARS", "Gradients", "Kind", "drawn", "made", "noting", "same", "step", "told"]

Gradients = dict[str, Tensor]


Kind = TypeVar("Kind", bound=nn.Module)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=(2, 1)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 9, 1),
    "same 3": lambda: SameConv2d(4, 6, 3, 2),
    "same 5": lambda: SameConv2d(4, 4, 5, 2, groups=4),
    "same, stride 1": lambda: SameConv2d(4, 6, 3),
}


LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one example": (lambda: nn.Linear(8, 5), (8,)),
    "rows": (lambda: nn.Linear(8, 5), (7, 8)),
    "without bias": (lambda: nn.Linear(8, 5, bias=False), (7, 8)),
    "tokens": (lambda: nn.Linear(8, 5), (3, 7, 8)),
    "tokens without bias": (lambda: nn.Linear(8, 5, bias=False), (3, 7, 8)),
    "heads": (lambda: nn.Linear(8, 5), (3, 2, 7, 8)),
}


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (build, (2, 4, 9, 8)) for name, build in CONVOLUTIONS.items()},
    **LINEARS,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(model: Kind, prune: float, *, rows: bool = False, half: bool = False, centre: bool = False) -> Kind:
    """The model with its layers told to store their inputs pruned."""
    latest = RecentInputs()
    attach_input_pruning(
        model,
        InputStorage(PruningRule(prune, half, centre), rows, latest),
        InputStorage(PruningRule(prune, half), rows, latest),
    )
    return model


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def noting(saved: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    return note


def same(found: Any, wanted: Any) -> bool:
    return torch.equal(found, wanted)


def step(layer: nn.Module, x: Tensor, weigh: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """The output, and the gradients of a weighed sum of it by the input and the parameters."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    out.backward(drawn(*out.shape, seed=9).to(out.dtype) if weigh is None else weigh)
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return out.detach(), {**found, "input": x.grad}
