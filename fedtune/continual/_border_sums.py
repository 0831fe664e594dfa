"""Sums of the activity of inputs: each client adds its own, the server adds those of all clients and tasks.

A weight's sums of |x| over its input channels travel in one tensor with the number of inputs as its last entry.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune import merging
from fedtune.merging import ActivationStatistics, ActivationSums, InputChannels
from fedtune.wire.client_update import TensorSpec

__all__ = ["add_sums", "average_sums", "declare_sums", "pack_sums"]

Tensors = Mapping[str, Tensor]


def declare_sums(places: Mapping[str, InputChannels]) -> dict[str, TensorSpec]:
    """Return the tensor of each weight: its sums and the count."""
    return {name: TensorSpec((place.size + 1,), negative=False) for name, place in places.items()}


def pack_sums(found: Mapping[str, ActivationSums]) -> dict[str, Tensor]:
    """Return the tensors of ``declare_sums``, fp32."""
    return {name: torch.cat([total.sums, torch.tensor([total.count])]).float() for name, total in found.items()}


def add_sums(parts: Iterable[Tensors]) -> dict[str, Tensor]:
    """Add tensors by name in the given order; double."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = tensor.double() + total[name] if name in total else tensor.double()
    return total


def average_sums(model: nn.Module, sums: Tensors, names: Sequence[str]) -> dict[str, ActivationStatistics]:
    """Return the mean activity of the weights among ``names`` whose inputs were counted."""
    places = merging.find_input_channels(model, set(names))
    found = {name: ActivationSums(sums[name][:-1].double(), int(sums[name][-1])) for name in places if name in sums}
    return merging.average_activations(places, found)
