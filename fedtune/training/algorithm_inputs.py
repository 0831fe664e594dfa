"""What a client's round has of the recipe's algorithm."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fedtune.algorithms import Algorithm

__all__ = ["AlgorithmInputs"]


class AlgorithmInputs(NamedTuple):
    """The algorithm, the tensors that the device kept after its last merged round, and those that the server sent."""

    algorithm: Algorithm
    stored: Mapping[str, Tensor] = {}
    received: Mapping[str, Tensor] = {}
