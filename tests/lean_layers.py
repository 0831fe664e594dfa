"""A layer that keeps less beside the plain one: outputs, gradients, and what autograd keeps for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["both", "kept", "same_bits"]


def both(
    plain: nn.Module, other: nn.Module, x: Tensor, *, input_trained: bool = True
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Output and gradients, of the input first, by each of two layers of common parameters."""
    g: Tensor | None = None
    found = []
    for layer in (plain, other):
        at = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(input_trained)
        plain.zero_grad()
        torch.manual_seed(3)
        out = layer(at)
        g = torch.randn_like(out) if g is None else g
        out.backward(g)
        grads = [p.grad.clone() if p.grad is not None else None for p in plain.parameters()]
        found.append([out.detach(), at.grad, *grads])
    return found[0], found[1]


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))


def kept(layer: Callable[[Tensor], Tensor], x: Tensor, *held: Tensor) -> list[Tensor]:
    """What autograd keeps for a layer's backward pass, beside what is held anyway; each storage once."""
    found: dict[int, Tensor] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in held}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return list(found.values())
