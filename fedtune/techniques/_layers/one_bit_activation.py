"""Activation functions that store one bit per element for the backward pass; PyTorch stores their input.

The gradient of ReLU and ReLU6 is g or 0, so one bit is enough. That of hard-swish is not; MobileTL uses
g * 1[x >= 0] instead and, as published, for ReLU6 too.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.techniques._layers.bit_packing import pack_bits, unpack_bits
from fedtune.techniques._layers.layer_replacement import ForwardOverride, ReplacementLayer

__all__ = [
    "EXACT_GRADIENTS",
    "SIGN_GRADIENTS",
    "GradientRule",
    "OneBitActivation",
    "make_one_bit_activation",
    "mask_activations",
]


class GradientRule(NamedTuple):
    """A function, and where its gradient passes: a bool of x's shape."""

    function: Callable[[Tensor], Tensor]
    passes_gradient: Callable[[Tensor], Tensor]


def _above_zero(x: Tensor) -> Tensor:
    return ~(x <= 0)  # where x is not a number, autograd lets the gradient through


def _inside(x: Tensor) -> Tensor:
    return (x > 0) & (x < 6)


def _not_negative(x: Tensor) -> Tensor:
    return x >= 0


EXACT_GRADIENTS: Mapping[type[nn.Module], GradientRule] = {
    nn.ReLU: GradientRule(F.relu, _above_zero),
    nn.ReLU6: GradientRule(F.relu6, _inside),
}
"""The gradients of autograd, to the bit."""

SIGN_GRADIENTS: Mapping[type[nn.Module], GradientRule] = {
    nn.ReLU6: GradientRule(F.relu6, _not_negative),
    nn.Hardswish: GradientRule(F.hardswish, _not_negative),
}
"""MobileTL's approximation: the sign of x."""


class OneBitActivation(ReplacementLayer):
    """An activation in whose backward pass the gradient passes or does not."""

    def __init__(self, activation: nn.Module, rule: GradientRule) -> None:
        super().__init__()
        self.activation, self.rule = activation, rule

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape; the function itself is not approximated."""
        out: Tensor = _Masked.apply(x, self.rule)
        return out

    def to_plain_layer(self) -> nn.Module:
        """The activation it was."""
        return self.activation


def make_one_bit_activation(activation: nn.Module, rules: Mapping[type[nn.Module], GradientRule]) -> nn.Module:
    """An activation with the rule of its kind; one without a rule as it is."""
    rule = rules.get(type(activation))
    return activation if rule is None else OneBitActivation(activation, rule)


class _MaskedForward(ForwardOverride):
    """Runs an activation with its rule. The module stays, with the hooks that others add to it."""

    def __init__(self, rule: GradientRule) -> None:
        self.rule = rule

    def __call__(self, x: Tensor) -> Tensor:
        """Of any shape; the function itself is not approximated."""
        out: Tensor = _Masked.apply(x, self.rule)
        return out


def mask_activations(model: nn.Module) -> None:
    """Let ReLU and ReLU6 store bits. Otherwise they would store all of what the next layer stores in another form."""
    inner = {layer.activation for layer in model.modules() if isinstance(layer, OneBitActivation)}
    for layer in model.modules():
        if type(layer) in EXACT_GRADIENTS and layer not in inner and "forward" not in vars(layer):
            _MaskedForward(EXACT_GRADIENTS[type(layer)]).install(layer)


class _Masked(torch.autograd.Function):
    """Keeps a packed mask, ceil(elements / 8) bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: GradientRule) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_bits(rule.passes_gradient(x)))
        return rule.function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [g] = gradients
        [bits] = ctx.saved_tensors
        return g.masked_fill(~unpack_bits(bits, g.numel()).view(g.shape), 0), None
