"""The block of mobile nets: widen, filter each channel, narrow again. Sandler et al. 2018, "MobileNetV2"."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["InvertedResidual"]


class InvertedResidual(nn.Module, ABC):
    """Convolutions, norms and activations in a row; the input is added where the shapes allow it.

    Layers bear the names of the checkpoint the net was published with, and may be replaced under them.
    """

    def __init__(self, *, adds_input: bool) -> None:
        super().__init__()
        self.has_residual = adds_input

    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The layers as they are now, in the order they are called."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c', h', w']."""
        out = x
        for layer in self.layers():
            out = layer(out)
        return x + out if self.has_residual else out
