"""What a server remembers for an analytic head: sums of two halves of the clients, and which clients were counted."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.continual._feature_sums import FeatureSums, add_sums, count_once, make_empty_sums

__all__ = ["CountedSums", "make_counted_sums", "read_counted_sums"]

_HALVES = ("even", "odd")


class CountedSums(NamedTuple):
    """The sums of the clients with even and with odd numbers, and ``counted`` [tasks, clients], 1 if added already.

    ``backbone`` is the digest of what computed the features.
    """

    halves: tuple[FeatureSums, FeatureSums]
    counted: Tensor
    backbone: Tensor

    @property
    def total(self) -> FeatureSums:
        """The sums of all clients."""
        return add_sums(self.halves)

    def add_task(self, task: int, uploads: Mapping[int, FeatureSums]) -> "CountedSums":
        """Add the sums of a task's clients, each at most once, in client order."""
        even, odd = ({client: one for client, one in uploads.items() if client % 2 == half} for half in (0, 1))
        first, counted = count_once(self.halves[0], self.counted, task, even)
        second, counted = count_once(self.halves[1], counted, task, odd)
        return CountedSums((first, second), counted, self.backbone)

    def list_tensors(self) -> dict[str, Tensor]:
        """Return all as tensors by name."""
        named = {
            f"{half}.{name}": tensor
            for half, sums in zip(_HALVES, self.halves, strict=True)
            for name, tensor in sums._asdict().items()
        }
        return {**named, "counted": self.counted, "backbone": self.backbone}


def make_counted_sums(
    num_classes: int, num_features: int, num_tasks: int, num_clients: int, backbone: Tensor
) -> CountedSums:
    """Return the memory before any client was counted."""
    empty = make_empty_sums(num_classes, num_features)
    return CountedSums((empty, empty), torch.zeros(num_tasks, num_clients, dtype=torch.uint8), backbone)


def read_counted_sums(tensors: Mapping[str, Tensor]) -> CountedSums:
    """Undo ``list_tensors``."""
    even, odd = (FeatureSums(*(tensors[f"{half}.{name}"] for name in FeatureSums._fields)) for half in _HALVES)
    return CountedSums((even, odd), tensors["counted"], tensors["backbone"])
