"""The inverted residual block of MobileNets: expand, depthwise convolution, project.

Sandler et al. 2018, "MobileNetV2".
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["InvertedResidual"]


class InvertedResidual(nn.Module, ABC):
    """A sequence of convolutions, norms and activations, with a residual connection where the shapes allow it.

    The layers have the names of the published checkpoint. A layer can be replaced under its name.
    """

    def __init__(self, *, adds_input: bool) -> None:
        super().__init__()
        self.has_residual = adds_input

    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """Return the current layers in the order in which they are called."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: [n, c, h, w] -> [n, c', h', w']."""
        out = x
        for layer in self.layers():
            out = layer(out)
        return x + out if self.has_residual else out
