"""A convolution behind a gate, against the plain one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedtune.techniques._layers.layer_replacement import ReplacementLayer
from fedtune.techniques.mobile._product_input_conv2d import make_product_input_conv2d
from tests.lean_layers import kept

Make = Callable[[Tensor], Tensor]


def gated(x: Tensor) -> Tensor:
    """A map times a gate made of it, as squeeze-excite does."""
    return x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gated(x)


INPUTS: dict[str, Make] = {
    "a gated map": gated,
    "a square": lambda x: x * x,
    "a sum": lambda x: x + 1,
    "a product with a constant": lambda x: x * torch.ones(6, 1, 1),
    "what is given": lambda x: x,
}


def pair(bias: bool) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(1)
    plain = nn.Conv2d(6, 4, 1, bias=bias)
    lean = make_product_input_conv2d(plain)
    assert isinstance(lean, nn.Conv2d)
    assert lean is not plain
    return plain, lean


def run(layer: nn.Conv2d, make: Make) -> list[Tensor]:
    """Output, and gradients by the input and by the parameters."""
    torch.manual_seed(2)
    x = torch.randn(3, 6, 5, 5, requires_grad=True)
    out = layer(make(x))
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], torch.randn_like(out))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_output_and_gradients_are_the_plain_ones_to_the_bit(make: Make, bias: bool) -> None:
    plain, lean = pair(bias)
    assert all(torch.equal(one, other) for one, other in zip(run(plain, make), run(lean, make), strict=True))


def test_the_product_is_not_kept() -> None:
    x = torch.randn(3, 6, 5, 5, requires_grad=True)
    plain, lean = pair(bias=False)
    for layer, maps in ((plain, 2), (lean, 1)):
        found = kept(nn.Sequential(Gate(), layer), x)
        assert sum(one.numel() == x.numel() for one in found) == maps


def test_without_gradients_or_with_a_frozen_weight_it_is_the_plain_layer() -> None:
    plain, lean = pair(bias=False)
    x = torch.randn(3, 6, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(lean(gated(x)), plain(gated(x)))
    lean.weight.requires_grad_(False)
    [found] = torch.autograd.grad(lean(gated(x)).sum(), [x])
    [wanted] = torch.autograd.grad(plain(gated(x)).sum(), [x])
    assert torch.equal(found, wanted)


def test_it_becomes_the_plain_convolution_again_and_leaves_others_alone() -> None:
    plain, lean = pair(bias=False)
    assert isinstance(lean, ReplacementLayer)
    again = lean.to_plain_layer()
    assert type(again) is nn.Conv2d
    assert again.weight is plain.weight
    odd = nn.Conv2d(6, 4, 3, padding="same")
    assert make_product_input_conv2d(odd) is odd
