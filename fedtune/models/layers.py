"""Layers shared by the image models, and the initialisation of models without pretrained weights."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["GlobalAveragePool", "flatten_layers", "init_weights", "make_conv_norm"]


class GlobalAveragePool(nn.Module):
    """The mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over pixels: [n, c, h, w] -> [n, c]."""
        return x.mean(dim=(2, 3))


def make_conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """Return a convolution [h, w] -> [ceil(h / stride), ceil(w / stride)], its norm, and the activation, if any."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, norm(outputs), *([activation()] if activation else []))


def flatten_layers(parts: nn.Sequential) -> list[nn.Module]:
    """Return the layers in the order in which they are called, with nested sequences flattened."""
    return [layer for part in parts for layer in (part if isinstance(part, nn.Sequential) else [part])]


def init_weights(model: nn.Module) -> None:
    """Initialise convolutions as He et al. 2015, "Delving Deep into Rectifiers", eq. 14, and linear layers near zero.

    torchvision uses the fan-out over all groups, which gives depthwise convolutions a smaller deviation. With running
    statistics that are not yet trained, the signal would vanish.
    """
    model.apply(_draw)


def _draw(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.weight[:, 0].numel() // layer.groups
        nn.init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
    else:
        return
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
