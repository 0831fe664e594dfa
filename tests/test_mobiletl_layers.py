"""Layers that keep less, each against the plain layer: values, gradients and bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques._layers.conv2d import make_efficient_conv2d
from fedtune.techniques._layers.dropout import MemoryEfficientDropout, make_efficient_dropout
from fedtune.techniques._layers.frozen_batch_norm import FrozenBatchNorm2d, make_frozen_batch_norm
from fedtune.techniques._layers.one_bit_activation import EXACT_GRADIENTS, SIGN_GRADIENTS, make_one_bit_activation
from tests.lean_layers import both, kept, same_bits

DTYPES = (torch.float32, torch.float64)
EDGES = (-1.0, -0.0, 0.0, 1e-30, 3.0, 5.9999, 6.0, 7.0, -3.0)


def a_norm(channels: int = 5, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    norm: Any = nn.BatchNorm2d(channels, eps=1e-3).to(dtype).eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    norm.bias.requires_grad_(True)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_shift_norm_is_the_frozen_norm_to_the_bit_and_keeps_nothing(dtype: torch.dtype, rows: int) -> None:
    norm = a_norm(dtype=dtype)
    made = make_frozen_batch_norm(norm)
    assert isinstance(made, FrozenBatchNorm2d)
    x = torch.randn(rows, 5, 7, 3, dtype=dtype)
    wanted, found = both(norm, made.train(), x)
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    assert kept(made, x.requires_grad_(), *norm.parameters(), *norm.buffers()) == []
    assert kept(norm, x, *norm.parameters(), *norm.buffers()) != []


@pytest.mark.parametrize("of_g", ["contiguous", "channels last", "columns first"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels last", "columns first"])
def test_a_shift_norm_sums_in_the_plain_norms_order_however_inputs_and_gradients_lie_in_memory(
    of_x: str, of_g: str
) -> None:
    norm = a_norm(16)
    x, g = laid_out(torch.randn(4, 16, 9, 7), of_x), laid_out(torch.randn(4, 16, 9, 7), of_g)
    found = []
    for layer in (norm, make_frozen_batch_norm(norm)):
        norm.bias.grad, given = None, x.detach().requires_grad_()
        layer(given).backward(g)
        assert given.grad is not None
        found.append((given.grad, norm.bias.grad))
    for one, other in zip(*found, strict=True):
        assert same_bits(one, other)
        assert one.stride() == other.stride()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another order in memory."""
    if layout == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.mT.contiguous().mT if layout == "columns first" else tensor


def test_a_shift_norm_has_the_gradients_of_its_formula() -> None:
    norm = a_norm(dtype=torch.float64)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    make_frozen_batch_norm(norm)(x).backward(g)
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert x.grad is not None
    assert norm.bias.grad is not None
    torch.testing.assert_close(x.grad, a[:, None, None] * g, rtol=1e-13, atol=0)
    torch.testing.assert_close(norm.bias.grad, g.sum((0, 2, 3)), rtol=1e-13, atol=1e-13)


def test_a_shift_norm_follows_weights_and_statistics_that_are_loaded_later() -> None:
    norm = a_norm()
    made = make_frozen_batch_norm(norm)
    other = a_norm()
    with torch.no_grad():
        other.weight.mul_(2)
        other.running_var.add_(3)
    made.load_state_dict(other.state_dict())
    wanted, found = both(other, made, torch.randn(2, 5, 4, 4))
    assert same_bits(wanted[0], found[0])
    assert same_bits(wanted[1], found[1])


def test_a_shift_norm_whose_scale_is_trained_has_its_gradient_too_and_never_moves_its_statistics() -> None:
    norm = a_norm()
    norm.weight.requires_grad_(True)
    before = norm.state_dict()["running_mean"].clone()
    wanted, found = both(norm, make_frozen_batch_norm(norm).train(), torch.randn(3, 5, 4, 4))
    assert found[2] is not None
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    assert torch.equal(norm.state_dict()["running_mean"], before)


def test_norms_without_parameters_or_statistics_stay_as_they_are() -> None:
    for norm in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3)):
        assert make_frozen_batch_norm(norm) is norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.ReLU6(inplace=True)])
def test_an_exact_mask_has_autograds_gradient_to_the_bit_at_every_edge(
    activation: nn.Module, dtype: torch.dtype
) -> None:
    x = torch.cat([torch.tensor(EDGES, dtype=dtype), 4 * torch.randn(100, dtype=dtype)])
    plain = type(activation)()
    wanted, found = both(plain, make_one_bit_activation(activation, EXACT_GRADIENTS), x)
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    assert found[1] is not None
    assert int((found[1] != 0).sum()) > 30


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.ReLU6()])
def test_a_signed_mask_lets_the_gradient_through_where_x_is_not_negative(activation: nn.Module) -> None:
    x = torch.cat([torch.tensor([*EDGES, torch.nan]), 4 * torch.randn(100)]).requires_grad_()
    out = make_one_bit_activation(activation, SIGN_GRADIENTS)(x)
    assert same_bits(out.detach(), type(activation)()(x).detach())
    g = torch.randn(len(x))
    out.backward(g)
    assert x.grad is not None
    wanted = [float(one) if value >= 0 else 0.0 for one, value in zip(g, x.tolist(), strict=True)]
    assert x.grad.tolist() == pytest.approx(wanted, abs=0)


def test_hard_swish_and_others_have_no_exact_mask() -> None:
    for activation in (nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Identity()):
        assert make_one_bit_activation(activation, EXACT_GRADIENTS) is activation


@pytest.mark.parametrize("size", [1, 7, 8, 9, 12345])
def test_a_mask_takes_a_bit_per_element_rounded_up_to_bytes(size: int) -> None:
    layer = make_one_bit_activation(nn.ReLU6(), EXACT_GRADIENTS)
    x = torch.randn(size, requires_grad=True)
    [bits] = kept(layer, x)
    assert (bits.dtype, bits.numel()) == (torch.uint8, -(-size // 8))
    wanted, found = both(nn.ReLU6(), layer, x)
    assert same_bits(wanted[1], found[1])


@pytest.mark.parametrize("lay", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(1, 3)])
def test_a_mask_is_right_for_maps_however_they_lie_in_memory(lay: Callable[[Tensor], Tensor]) -> None:
    x = lay(torch.randn(3, 5, 7, 6))
    assert not x.is_contiguous()
    wanted, found = both(nn.ReLU6(), make_one_bit_activation(nn.ReLU6(), EXACT_GRADIENTS), x)
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))


def test_dropout_draws_the_same_numbers_and_keeps_a_bit_per_element() -> None:
    plain, layer = nn.Dropout(0.3), make_efficient_dropout(nn.Dropout(0.3, inplace=True))
    x = torch.randn(33, 7)
    wanted, found = both(plain, layer, x)
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    [bits] = kept(layer, x.requires_grad_())
    assert bits.numel() == -(-33 * 7 // 8)
    assert torch.equal(layer.eval()(x), x)
    for p in (0.0, 1.0):
        assert torch.equal(MemoryEfficientDropout(p).train()(x), nn.Dropout(p).train()(x))


def test_the_functions_pass_gradcheck() -> None:
    norm: Any = make_frozen_batch_norm(a_norm(2, torch.float64))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *at: norm(at[0]), (x, norm.bias))
    for groups in (1, 2):
        convolution = SameConv2d(2, 2, 3, 2, groups=groups).double()
        layer = make_efficient_conv2d(convolution)
        assert torch.autograd.gradcheck(lambda *at, layer=layer: layer(at[0]), (x, convolution.weight))


def test_a_layer_that_runs_twice_has_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(4, 4, 3, groups=4)
    convolution.weight.requires_grad_(False)
    norm = a_norm(4)
    plain = nn.Sequential(convolution, norm, nn.ReLU6())
    less = nn.Sequential(
        make_efficient_conv2d(convolution),
        make_frozen_batch_norm(norm),
        make_one_bit_activation(nn.ReLU6(), EXACT_GRADIENTS),
    )
    wanted, found = both(nn.Sequential(plain, plain), nn.Sequential(less, less), torch.randn(2, 4, 6, 6))
    assert found[-1] is not None
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
