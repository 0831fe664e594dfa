"""A convolution that normalises its weights in place of its outputs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.memory import StorageMeter
from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques.pruning._pruned_tensor import PruningRule, pack_pruned, unpack_pruned
from fedtune.techniques.pruning._standardised_conv2d import (
    iter_standardised_conv2d,
    standardise_weight,
)
from tests.normalised_nets import PADDED, STRIDED, Net, a_mask, drawn, gradients, made_normal

_C = math.sqrt(2 / (1 - 1 / math.pi))


def row_twin(w: list[float], active: list[int], gain: float, scale: float) -> list[float]:
    """One output channel, by the book."""
    at = [index for index, is_active in enumerate(active) if is_active]
    if len(at) < 2:
        return [gain * w[index] if index in at else 0.0 for index in range(len(w))]
    mean = sum(w[index] for index in at) / len(at)
    variance = sum((w[index] - mean) ** 2 for index in at) / len(at)
    size = math.sqrt(len(at) * variance + 1e-6)
    return [gain * scale * (w[index] - mean) / size if index in at else 0.0 for index in range(len(w))]


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.02])
def test_weights_are_standardised_over_what_is_active(density: float) -> None:
    w, g = drawn(16, 4, 3, 3, dtype=torch.float64) + 0.3, drawn(16, seed=2, dtype=torch.float64)
    mask = a_mask(16, 4, 3, 3, density=density)
    rows = [
        row_twin(*row, scale=_C)
        for row in zip(w.flatten(1).tolist(), mask.flatten(1).tolist(), g.tolist(), strict=True)
    ]
    found = standardise_weight(w, g, mask, _C)
    torch.testing.assert_close(found.flatten(1), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert not found[mask == 0].any()


@pytest.mark.parametrize("density", [None, 0.5, 0.1])
def test_a_row_sums_to_nothing_and_its_squares_to_those_of_gain_and_scale(density: float | None) -> None:
    mask = None if density is None else a_mask(64, 64, 3, 3, density=density)
    g = torch.linspace(0.5, 2, 64)
    w_hat = standardise_weight(drawn(64, 64, 3, 3) + 0.3, g, mask, _C).flatten(1)
    assert w_hat.sum(1).abs().max() < 1e-5
    torch.testing.assert_close(w_hat.square().sum(1), (g * _C) ** 2, rtol=1e-5, atol=0)


def test_a_full_mask_is_no_mask_and_that_is_scaled_weight_standardisation() -> None:
    w = drawn(6, 5, 3, 3, dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    variance, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(standardise_weight(w, ones, None, _C), _C * (w - mean) / (45 * variance + 1e-6).sqrt())
    assert torch.equal(standardise_weight(w, ones, torch.ones_like(w), _C), standardise_weight(w, ones, None, _C))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_after_a_relu_channels_have_no_mean_and_unit_variance_where_plain_weights_have_large_ones(
    density: float,
) -> None:
    x, w = drawn(8, 64, 20, 20, seed=3).relu(), 0.3 + drawn(64, 64, 3, 3)
    mask = a_mask(64, 64, 3, 3, density=density)
    out = F.conv2d(x, standardise_weight(w, torch.ones(64), mask, _C))
    plain = F.conv2d(x, w * mask)
    assert out.mean((0, 2, 3)).abs().max() < 0.15
    assert abs(float(out.var()) - 1) < 0.1
    assert plain.mean((0, 2, 3)).abs().max() > 5


def test_a_number_added_to_all_inputs_changes_no_output() -> None:
    w_hat = standardise_weight(drawn(4, 6, 3, 3, dtype=torch.float64), torch.ones(4).double(), a_mask(4, 6, 3, 3), _C)
    x = drawn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x + 7, w_hat), F.conv2d(x, w_hat), rtol=0, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    model = Net().double()
    made_normal(model)
    layers = list(iter_standardised_conv2d(model))
    for _, layer in layers:
        x = drawn(2, layer.in_channels, 5, 5, dtype=torch.float64).requires_grad_()
        inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
        names = [name for name, _ in layer.named_parameters()]

        def run(x: Tensor, *parameters: Tensor) -> Any:
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))  # noqa: B023

        assert torch.autograd.gradcheck(run, inputs)
    assert len(layers) == 2


def test_active_weights_get_the_gradient_of_differences_and_inactive_ones_that_of_their_effective_weight() -> None:
    mask = a_mask(3, 4, 3, 3)
    w = (drawn(3, 4, 3, 3, dtype=torch.float64) * mask).requires_grad_()
    g, weigh = drawn(3, seed=2, dtype=torch.float64), drawn(3, 4, 3, 3, seed=4, dtype=torch.float64)
    (standardise_weight(w, g, mask, _C) * weigh).sum().backward()
    places = mask.nonzero().tolist()
    assert w.grad is not None
    for place in map(tuple, places):
        moved = torch.zeros_like(w)
        moved[place] = 1e-6
        up, down = (float((standardise_weight(w.detach() + s * moved, g, mask, _C) * weigh).sum()) for s in (1, -1))
        assert abs((up - down) / 2e-6 - float(w.grad[place])) < 1e-6
    row = w.detach().flatten(1)
    centred = mask.flatten(1) * (row - row.sum(1, keepdim=True) / mask.flatten(1).sum(1, keepdim=True))
    factor = (g * _C / (centred.square().sum(1) + 1e-6).sqrt())[:, None, None, None]
    torch.testing.assert_close(w.grad[mask == 0], (factor * weigh)[mask == 0])


@pytest.mark.parametrize("prune", [0.0, 0.6])
@pytest.mark.parametrize("kind", [PADDED, STRIDED])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_has_the_gradients_of_the_formula_written_out(
    prune: float, kind: Callable[..., nn.Conv2d], masked: bool
) -> None:
    model = Net(kind).double()
    made_normal(model, prune)
    layer: Any = model.deep
    layer.gain.data = drawn(8, seed=5, dtype=torch.float64)
    if masked:
        layer.register_buffer("mask", a_mask(*layer.weight.shape))
    x = drawn(2, 8, 9, 8, dtype=torch.float64).relu()
    found = gradients(layer, x)
    x_hat = unpack_pruned(*pack_pruned(x, PruningRule(prune), x.numel()))
    w, g = layer.weight.detach().requires_grad_(), layer.gain.detach().requires_grad_()
    margins = layer.compute_same_padding(9, 8) if isinstance(layer, SameConv2d) else (1, 1, 1, 1)
    for given, names in ((x, ("out", "input", "bias")), (x_hat, ("weight", "gain"))):
        given = given.clone().requires_grad_()
        b = layer.bias.detach().requires_grad_()
        w.grad = g.grad = None
        out = F.conv2d(F.pad(given, margins), standardise_weight(w, g, layer.mask, _C), b, layer.stride)
        out.backward(drawn(*out.shape, seed=9, dtype=out.dtype))
        wanted = {"out": out.detach(), "input": given.grad, "bias": b.grad, "weight": w.grad, "gain": g.grad}
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)


def test_it_keeps_its_pruned_input_and_nothing_of_its_weights() -> None:
    model = Net()
    made_normal(model, 0.5)
    x = drawn(2, 8, 12, 12).requires_grad_()
    with StorageMeter(excluded=[*model.parameters(), x]) as meter:
        out = model.deep(x)
        kept = meter.current_bytes - out.untyped_storage().nbytes()
    assert kept == x.numel() // 2 * 4 + x.numel() // 8


def test_scoring_gives_what_training_gives_and_no_example_depends_on_another() -> None:
    model = Net()
    made_normal(model)
    layer = model.deep
    x = drawn(4, 8, 6, 6)
    whole = layer(x)
    torch.testing.assert_close(torch.cat([layer(one) for one in x.split(1)]), whole)
    assert torch.equal(layer.eval()(x), whole)
