"""A convolution that standardises its weights instead of its outputs, so that it needs no batch statistics.

Per output channel, over the n weights that are active (m = 1):
    w_hat = g c m (w - mu) / sqrt(n s^2 + eps),   mu and s^2 the mean and variance of those weights,
so that they sum to 0 and their squares to (g c)^2: a mean that all inputs share falls away, and variance is kept.
c = sqrt(2 / (1 - 1 / pi)) undoes what a ReLU in front takes from the variance; 1 without one. A channel of a single
active weight is not standardised. An inactive weight, though zero, gets the gradient of its w_hat in the channel's
scale: a mask that moves goes by it, and whoever sets the mask masks it for the update.

The convolution keeps its name and its weight, and gets ``gain`` (g) and a bias; the batch norm behind it goes. A buffer
``mask`` of the weight's shape, if there is one, says what is active.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedtune.errors import ModelError
from fedtune.techniques._implicit_gradients import compute_input_gradients
from fedtune.techniques._layers.convolution_functions import Geometry, convolve, convolve_backward
from fedtune.techniques._module_trace import ModuleCall, trace_modules
from fedtune.techniques.pruning._pruned_input_layers import InputStorage, get_geometry, is_supported_conv2d
from fedtune.techniques.pruning._pruned_tensor import PackedLayout, unpack_pruned

__all__ = [
    "ConvNormPair",
    "find_conv_norm_pairs",
    "is_standardised",
    "iter_standardised_conv2d",
    "restore_batch_norms",
    "standardise_convolutions",
    "standardise_weight",
]

_EPS = 1e-6
_AFTER_RELU = math.sqrt(2 / (1 - 1 / math.pi))


class ConvNormPair(NamedTuple):
    """Names of a convolution and of the norm that reads it, and whether a ReLU gives what it reads itself."""

    convolution: str
    norm: str
    after_relu: bool


def standardise_weight(weight: Tensor, gain: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """w_hat of weights [outputs, inputs, h, w], gains [outputs] and a mask like the weights."""
    w = weight.flatten(1)
    m = torch.ones_like(w) if mask is None else mask.flatten(1).to(w.dtype)
    n = m.sum(1, keepdim=True)
    centred = m * (w - (m * w).sum(1, keepdim=True) / n.clamp(min=1))
    factor = scale / (centred.square().sum(1, keepdim=True) + _EPS).sqrt()
    w_hat = torch.where(n < 2, m * w, factor * centred)
    if mask is not None:
        w_hat = w_hat + torch.where(n < 2, 1.0, factor.detach()) * (1 - m) * (w - w.detach())
    return (gain[:, None] * w_hat).view_as(weight)


def find_conv_norm_pairs(model: nn.Module) -> list[ConvNormPair]:
    """Convolutions directly followed by a batch norm, in the order they run; ModelError if there are none."""
    calls = trace_modules(model)
    givers = {
        id(call.output): call
        for call in calls
        if isinstance(call.module, nn.Conv2d) and is_supported_conv2d(call.module)
    }
    pairs = [
        ConvNormPair(giver.name, call.name, _after_relu(calls, giver.input))
        for call in calls
        if type(call.module) is nn.BatchNorm2d and call.module.affine and (giver := givers.get(id(call.input)))
    ]
    if not pairs:
        raise ModelError(
            f"{type(model).__name__} has no batch norm behind a convolution; leave standardise_weights out"
        )
    return pairs


def _after_relu(calls: Sequence[ModuleCall], x: Tensor) -> bool:
    """Whether a ReLU gave a tensor, or a maximum over what a ReLU gave."""
    givers = [call for call in calls if call.output is x]
    pooled = [call.input for call in givers if isinstance(call.module, nn.MaxPool2d)]
    return any(isinstance(call.module, nn.ReLU | nn.ReLU6) for call in givers) or any(
        _after_relu(calls, taken) for taken in pooled
    )


def standardise_convolutions(model: nn.Module, pairs: list[ConvNormPair], keeping: InputStorage) -> list[str]:
    """Let the convolutions of pairs normalise their weights and drop the norms; names of the new parameters.

    Gains start at 1, biases at the norm's. Inputs are stored as ``keeping`` says.
    """
    for pair in pairs:
        layer, norm = model.get_submodule(pair.convolution), model.get_submodule(pair.norm)
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        scale = _AFTER_RELU if pair.after_relu else 1.0
        model.set_submodule(pair.norm, _RemovedNorm(norm, pair.convolution, bare=layer.bias is None))
        layer.gain = nn.Parameter(torch.ones_like(norm.weight))
        layer.bias = nn.Parameter(norm.bias.detach().clone())
        if "mask" not in dict(layer.named_buffers()):
            layer.register_buffer("mask", None)
        vars(layer)["forward"] = partial(_forward, layer, scale, keeping)
    return [f"{pair.convolution}.{name}" for pair in pairs for name in ("bias", "gain")]


def iter_standardised_conv2d(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Convolutions that standardise their weights, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and is_standardised(layer):
            yield name, layer


def is_standardised(layer: nn.Module) -> bool:
    """Whether the layer standardises its weights."""
    return getattr(vars(layer).get("forward"), "func", None) is _forward


@torch.no_grad()
def restore_batch_norms(model: nn.Module) -> None:
    """Write w_hat into plain convolutions and restore the norms, which then only add the bias."""
    for name, gone in list(model.named_modules()):
        if not isinstance(gone, _RemovedNorm):
            continue
        layer: Any = model.get_submodule(gone.convolution)
        norm = gone.norm
        scale = vars(layer)["forward"].args[1]
        layer.weight.copy_(standardise_weight(layer.weight, layer.gain, layer._buffers.pop("mask"), scale))
        norm.weight.fill_(1)
        norm.bias.copy_(layer.bias)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
        layer.bias = None if gone.bare else nn.Parameter(torch.zeros_like(layer.bias))
        del layer.gain, vars(layer)["forward"]
        model.set_submodule(name, norm)


class _RemovedNorm(nn.Identity):
    """Replaces a norm that is not needed after a standardised convolution."""

    def __init__(self, norm: nn.BatchNorm2d, convolution: str, *, bare: bool) -> None:
        super().__init__()
        vars(self)["norm"] = norm  # not as a child, whose parameters the model would count
        self.convolution = convolution
        self.bare = bare

    @property
    def norm(self) -> nn.BatchNorm2d:
        found: nn.BatchNorm2d = vars(self)["norm"]
        return found


def _forward(layer: Any, scale: float, keeping: InputStorage, x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, c', h', w']."""
    geometry = get_geometry(layer, x)
    if not (layer.training and torch.is_grad_enabled()):
        return convolve(x, standardise_weight(layer.weight, layer.gain, layer.mask, scale), layer.bias, geometry)
    kept, layout = keeping.pack(x, x[0].numel())
    out: Tensor = _Normalised.apply(x, layer.weight, layer.gain, layer.bias, layer.mask, scale, geometry, layout, *kept)
    return out


class _Normalised(torch.autograd.Function):
    """Stores what ``kept`` is given as; effective weights are made again, in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        scale: float,
        geometry: Geometry,
        layout: PackedLayout,
        *kept: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.geometry, ctx.layout = scale, geometry, layout
        ctx.save_for_backward(weight, gain, mask, *kept)
        return convolve(x, standardise_weight(weight, gain, mask, scale), bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, mask, *kept = ctx.saved_tensors
        parameters = weight.detach().requires_grad_(), gain.detach().requires_grad_()
        with torch.enable_grad():
            w_hat = standardise_weight(*parameters, mask, ctx.scale)
        wanted = ctx.needs_input_grad[0], True, ctx.needs_input_grad[3]
        x_hat = unpack_pruned(kept, ctx.layout).contiguous(memory_format=ctx.geometry.memory_format)
        by_x, by_w_hat, by_bias = convolve_backward(
            gradients[0], x_hat, x_hat.shape, w_hat.detach(), ctx.geometry, wanted
        )
        assert by_w_hat is not None  # it is wanted
        by_weight, by_gain = compute_input_gradients([w_hat], parameters, [by_w_hat])
        return by_x, by_weight, by_gain, by_bias, *(None,) * (4 + len(kept))
