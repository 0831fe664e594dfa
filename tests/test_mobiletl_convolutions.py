"""Convolutions that keep less, each against the plain layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques._layers.conv2d import make_efficient_conv2d
from tests.lean_layers import both, kept, same_bits


def explicit(convolution: SameConv2d) -> nn.Module:
    """The same convolution with its padding put around the map by a layer of its own."""

    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = convolution.weight

        def forward(self, x: Tensor) -> Tensor:
            k, s = convolution.kernel_size[0], convolution.stride[0]
            sides = []
            for size in (x.shape[3], x.shape[2]):
                total = max((-(-size // s) - 1) * s + k - size, 0)
                sides += [total // 2, total - total // 2]
            return F.conv2d(F.pad(x, sides), self.weight, None, s, 0, 1, convolution.groups)

    return Explicit()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (8, 5), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_inside_equals_explicit_padding_to_the_bit_and_is_not_kept(
    kernel: int, stride: int, size: tuple[int, int], trained: bool
) -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(6, 6, kernel, stride, groups=6)
    convolution.weight.requires_grad_(trained)
    layer = make_efficient_conv2d(convolution)
    x = torch.randn(2, 6, *size)
    wanted, found = both(explicit(convolution), layer, x)
    assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    held = kept(layer, x.requires_grad_(), convolution.weight)
    assert sum(tensor.numel() for tensor in held) == (x.numel() if trained else 0)


CONVOLUTIONS: list[tuple[dict[str, Any], int]] = [
    ({"in_channels": 4, "out_channels": 24, "kernel_size": 1}, 7),
    ({"in_channels": 24, "out_channels": 24, "kernel_size": 3, "padding": 1, "groups": 24}, 3),
    ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "bias": True}, 9),
    ({"in_channels": 4, "out_channels": 6, "kernel_size": (3, 5), "padding": (2, 4), "dilation": 2}, 9),
]


@pytest.mark.parametrize("input_trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("settings", "size"), CONVOLUTIONS)
def test_a_frozen_convolution_keeps_nothing_and_passes_gradients_on_to_the_bit(
    settings: dict[str, Any], size: int, dtype: torch.dtype, input_trained: bool
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(**{"bias": False, **settings}).to(dtype)
    convolution.weight.requires_grad_(False)
    layer = make_efficient_conv2d(convolution)
    x = torch.randn(2, convolution.in_channels, size, size, dtype=dtype)
    if input_trained or convolution.bias is not None:
        wanted, found = both(convolution, layer, x, input_trained=input_trained)
        assert all(same_bits(*pair) for pair in zip(wanted, found, strict=True))
    assert kept(layer, x.requires_grad_(), *convolution.parameters()) == []
    assert kept(convolution, x, *convolution.parameters()) != []


def test_convolutions_that_need_nothing_done_stay_as_they_are() -> None:
    trained = nn.Conv2d(3, 3, 3, padding=1)
    odd = nn.Conv2d(3, 3, 3, padding="same").requires_grad_(False)
    round_about = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular").requires_grad_(False)
    for convolution in (trained, odd, round_about, SameConv2d(3, 3, 3)):
        assert make_efficient_conv2d(convolution) is convolution


def test_changing_a_kept_map_in_place_is_noticed() -> None:
    convolution = SameConv2d(2, 2, 3, 2)
    x = torch.randn(1, 2, 4, 4)
    out = make_efficient_conv2d(convolution)(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
