"""The trained tensors at the start of a round. Most of them are read from the received state, without a copy."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.training.model_state import get_model_state, named_tensors, precise

__all__ = ["Start"]


class Start:
    """The tensors at the start of a round, in fp32, by name.

    ``received`` are the mappings that the model was loaded from; the first one with a name is used. Only those
    ``names`` that a technique has changed since are copied.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *received: Mapping[str, Tensor]) -> None:
        self._received = received
        tensors = named_tensors(model)
        self._changed = get_model_state(model, [name for name in names if not self._holds(name, tensors[name])])

    def _holds(self, name: str, tensor: Tensor) -> bool:
        return any(
            name in each and torch.equal(tensor, each[name].to(tensor.device, tensor.dtype)) for each in self._received
        )

    def __contains__(self, name: str) -> bool:
        return any(name in each for each in (self._changed, *self._received))

    def __getitem__(self, name: str) -> Tensor:
        return next(each[name] for each in (self._changed, *self._received) if name in each)

    def deltas(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return trained minus start tensors, in fp32 on the CPU.

        ``names`` may be fewer than those of the constructor.
        """
        return {name: precise(tensors[name].detach()) - self[name] for name in names}
