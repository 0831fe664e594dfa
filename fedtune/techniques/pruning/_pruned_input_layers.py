"""Linear layers and convolutions that store their input pruned; outputs are bit-equal to those of the dense layer.

With x_hat the pruned input, a linear layer's weight gradient is g^T x_hat; those by the input and by the bias need W
and g alone and stay exact. A frozen layer stores nothing. Layers stay what they are but for the function they call.
"""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.techniques._layers.convolution_functions import Geometry, convolve, convolve_backward
from fedtune.techniques.pruning._pruned_tensor import (
    PackedLayout,
    PackedTensor,
    PruningRule,
    pack_pruned,
    unpack_pruned,
)

__all__ = [
    "InputStorage",
    "PaddedConvolution",
    "RecentInputs",
    "attach_input_pruning",
    "detach_input_pruning",
    "get_geometry",
]


@runtime_checkable
class PaddedConvolution(Protocol):
    """A convolution with other margins around its input than ``padding``."""

    def compute_same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The rows and columns of zeros: left, right, top, bottom."""


class _Entry(NamedTuple):
    """The stored form of a tensor; ``key`` contains its state and how it was pruned."""

    tensor: weakref.ref[Tensor]
    key: tuple[int, PruningRule, int]
    packed: PackedTensor


class RecentInputs:
    """The two inputs stored last: layers given the same tensor share what is stored of it.

    Two, since a block's shortcut reads what its first layer read; no more, since whoever makes activations again keeps
    inputs alive for longer than what is stored of them.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentInputs, ()

    def clear(self) -> None:
        """Forget all stored inputs."""
        self._entries.clear()

    def pack(self, x: Tensor, rule: PruningRule, width: int) -> PackedTensor:
        """``x`` as it is stored; it is pruned unless it was before, and nobody wrote into it since."""
        key = (x._version, rule, width)
        known = next((one.packed for one in self._entries if one.tensor() is x and one.key == key), None)
        if known is None:
            known = pack_pruned(x, rule, width)
            self._entries = [*self._entries[-1:], _Entry(weakref.ref(x, self._forget), key, known)]
        return known

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._entries = [one for one in self._entries if one.tensor is not gone]


@dataclass(frozen=True)
class InputStorage:
    """How layers store their inputs; rows are tokens for linear layers and images for convolutions."""

    rule: PruningRule
    per_row: bool
    latest: RecentInputs

    def pack(self, x: Tensor, row: int) -> PackedTensor:
        """``x`` as it is stored; ``row`` entries make a token or a picture."""
        return self.latest.pack(x, self.rule, row if self.per_row else x.numel())


def attach_input_pruning(model: nn.Module, linear: InputStorage, convolution: InputStorage) -> int:
    """Let layers store their inputs pruned, and return how many do; the B of a low-rank pair reads too little."""
    detach_input_pruning(model)  # a layer that was made over carries what was bound to the one before
    count = 0
    for name, layer in model.named_modules():
        if "forward" not in vars(layer) and ".lora_B." not in name:
            if type(layer).forward is nn.Linear.forward:
                vars(layer)["forward"] = partial(_linear, layer, linear)
            elif isinstance(layer, nn.Conv2d) and is_supported_conv2d(layer):
                vars(layer)["forward"] = partial(_convolution, layer, convolution)
        count += _prunes_input(layer)
    return count


def detach_input_pruning(model: nn.Module) -> None:
    """Restore the layers' own ``forward``."""
    for layer in model.modules():
        if _prunes_input(layer):
            del vars(layer)["forward"]


def _prunes_input(layer: nn.Module) -> bool:
    return getattr(vars(layer).get("forward"), "func", None) in (_linear, _convolution)


def is_supported_conv2d(layer: nn.Conv2d) -> bool:
    """Whether the layer is a plain convolution with zero padding, as its fields say."""
    known = type(layer).forward is nn.Conv2d.forward or isinstance(layer, PaddedConvolution)
    return known and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _linear(layer: nn.Linear, keeping: InputStorage, x: Tensor) -> Tensor:
    """[..., inputs] -> [..., outputs]."""
    if not (layer.training and torch.is_grad_enabled() and layer.weight.requires_grad):
        return F.linear(x, layer.weight, layer.bias)
    kept, layout = keeping.pack(x, x.shape[-1])
    out: Tensor = _Linear.apply(x, layer.weight, layer.bias, layout, *kept)
    return out


def _convolution(layer: nn.Conv2d, keeping: InputStorage, x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, c', h', w'], as the layer's class does it."""
    if not (layer.training and torch.is_grad_enabled()):
        return type(layer).forward(layer, x)
    if x.dim() == 3:
        return _convolution(layer, keeping, x[None])[0]
    kept, layout = keeping.pack(x, x[0].numel()) if layer.weight.requires_grad else ((), None)
    out: Tensor = _Convolution.apply(x, layer.weight, layer.bias, get_geometry(layer, x), layout, *kept)
    return out


def get_geometry(layer: nn.Conv2d, x: Tensor) -> Geometry:
    """The geometry for an input [n, c, h, w]."""
    assert not isinstance(layer.padding, str)
    margins = layer.compute_same_padding(x.shape[-2], x.shape[-1]) if isinstance(layer, PaddedConvolution) else ()
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    return Geometry(margins if any(margins) else (), layer.stride, layer.padding, layer.dilation, layer.groups, order)


class _Linear(torch.autograd.Function):
    """Stores what ``kept`` is given as."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: PackedLayout, *kept: Tensor
    ) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        by_x, _, by_bias = ctx.needs_input_grad[:3]
        grad = gradients[0].reshape(-1, len(weight))
        x_hat = unpack_pruned(kept, ctx.layout).reshape(-1, weight.shape[1])
        return (
            (grad @ weight).view(ctx.layout.shape) if by_x else None,
            grad.t() @ x_hat,
            grad.sum(0) if by_bias else None,
            *(None,) * (1 + len(kept)),
        )


class _Convolution(torch.autograd.Function):
    """Stores what ``kept`` is given as: nothing where the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        layout: PackedLayout | None,
        *kept: Tensor,
    ) -> Tensor:
        ctx.geometry, ctx.layout, ctx.shape = geometry, layout, x.shape
        ctx.save_for_backward(weight, *kept)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        [grad] = gradients
        x_hat = (
            None
            if ctx.layout is None
            else unpack_pruned(kept, ctx.layout).contiguous(memory_format=ctx.geometry.memory_format)
        )
        found = convolve_backward(grad, x_hat, ctx.shape, weight, ctx.geometry, ctx.needs_input_grad[:3])
        return (*found, *(None,) * (2 + len(kept)))
