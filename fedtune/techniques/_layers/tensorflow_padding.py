"""Move TensorFlow's padding into the convolutions of MobileNets, so that the padded input is not stored.

MobileNets of transformers pad the input before each convolution.
"""

from torch import Tensor, nn

from fedtune.techniques._layers.conv2d import MemoryEfficientSameConv2d
from fedtune.techniques._layers.layer_replacement import ForwardOverride, convert_layer_class

__all__ = ["TensorFlowConv2d", "move_padding_into_conv2d"]


class TensorFlowConv2d(MemoryEfficientSameConv2d):
    """A convolution whose input was padded outside."""

    def compute_same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The rows and columns of zeros: left, right, top, bottom."""
        (left, right), (top, bottom) = self._missing(width), self._missing(height)
        down, across = self.dilation
        return left * across, right * across, top * down, bottom * down

    def to_plain_layer(self) -> nn.Conv2d:  # type: ignore[override]
        """The plain convolution, for inputs that are padded outside."""
        return convert_layer_class(self, nn.Conv2d)


class _UnpaddedForward(ForwardOverride):
    """Runs a convolution, its norm and its activation, without padding."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c', ceil(h / stride), ceil(w / stride)]."""
        for part in self.layer.children():
            x = part(x)
        return x


def move_padding_into_conv2d(model: nn.Module) -> None:
    """Let the convolutions of such layers pad their input."""
    for layer in list(model.modules()):
        convolution = getattr(layer, "convolution", None)
        if getattr(getattr(layer, "config", None), "tf_padding", False) and type(convolution) is nn.Conv2d:
            layer.add_module(
                "convolution", convert_layer_class(convolution, TensorFlowConv2d).train(convolution.training)
            )
            _UnpaddedForward(layer).install(layer)
