"""RanPAC's random projection, which every process derives from the seed instead of receiving it."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.seeds import derive_seed

__all__ = ["ProjectedHead", "make_projection"]


def make_projection(seed: int, num_features: int, width: int) -> Tensor:
    """Return R [d, width] with entries of N(0, 1 / d).

    All machines must have the same bits. NumPy draws them in double precision with hardly more than multiplications;
    torch's vectorised normal numbers differ between processors. The paper has N(0, 1); the factor keeps projected
    features near the size of the features, and cancels in a head with a relative ridge.
    """
    drawn = np.random.default_rng(derive_seed(seed, "projection")).standard_normal((num_features, width))
    return torch.from_numpy((drawn / math.sqrt(num_features)).astype(np.float32))


class ProjectedHead(nn.Module):
    """A linear head on h = relu(x R). R is neither trained nor sent: it is no part of the state."""

    projection: Tensor

    def __init__(self, seed: int, layer: nn.Linear, width: int) -> None:
        """Replace ``layer``; the new linear layer starts at zero, and has a bias if the old one has."""
        super().__init__()
        self.register_buffer("projection", make_projection(seed, layer.in_features, width), persistent=False)
        self.linear = nn.Linear(width, layer.out_features, bias=layer.bias is not None)
        nn.init.zeros_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits: [..., d] -> [..., C]."""
        logits: Tensor = self.linear(torch.relu(features @ self.projection.to(features.dtype)))
        return logits
