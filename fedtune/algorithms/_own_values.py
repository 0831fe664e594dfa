"""The values of a client's own model at the places of the shared one."""

from collections.abc import Mapping

from torch import Tensor, nn

from fedtune.algorithms._algorithm import AlgorithmSetup
from fedtune.algorithms._personal_model import copy_in_single_precision

__all__ = ["OWN", "OwnValues"]

OWN = "own/"
"""How the names of these values begin in what the device keeps."""


class OwnValues:
    """A client's own values: what the device stored, and received values where it has none yet.

    ``tensors`` are the shared model's at these places. ``trained`` are own parameters that the round trains. Others,
    such as those of a factor that rests in this round, take part and stay as they are.
    """

    def __init__(self, setup: AlgorithmSetup) -> None:
        stored = {name.removeprefix(OWN): one for name, one in setup.stored.items() if name.startswith(OWN)}
        self.tensors: Mapping[str, Tensor] = {**setup.parameters, **setup.statistics, **setup.resting}
        self.trained = {name: nn.Parameter(self._begin(name, stored)) for name in setup.parameters}
        self._resting = {name: self._begin(name, stored) for name in self.tensors if name not in self.trained}
        self._statistics = list(setup.statistics)

    def _begin(self, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        found = copy_in_single_precision(self.tensors[name])
        return found.copy_(stored[name]) if name in stored else found

    @property
    def values(self) -> dict[str, Tensor]:
        """All own values, by name."""
        return {**{name: one.detach() for name, one in self.trained.items()}, **self._resting}

    def list_trained(self) -> list[nn.Parameter]:
        """Return the own parameters that the round trains."""
        return list(self.trained.values())

    def read_statistics(self) -> None:
        """Take over the running statistics that the model has now."""
        for name in self._statistics:
            self._resting[name].copy_(self.tensors[name])

    def list_stored(self) -> dict[str, Tensor]:
        """Return what the device keeps."""
        return {f"{OWN}{name}": one for name, one in self.values.items()}
