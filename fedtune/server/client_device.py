"""The device of a client."""

from typing import NamedTuple

__all__ = ["ClientDevice"]


class ClientDevice(NamedTuple):
    """The device class of a client in the recipe, and the name of its device, which is None in a simulation."""

    device_class: str
    device_name: str | None = None

    @property
    def label(self) -> str:
        """The name to display: that of the device, or in a simulation that of its class."""
        return self.device_name or self.device_class
