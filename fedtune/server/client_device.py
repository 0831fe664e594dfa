"""What device a client of a run is."""

from typing import NamedTuple

__all__ = ["ClientDevice"]


class ClientDevice(NamedTuple):
    """The device class that the recipe gives a client, and the name of its device; None in a simulation."""

    device_class: str
    device_name: str | None = None

    @property
    def label(self) -> str:
        """The name for people: of the device, or in a simulation of its class."""
        return self.device_name or self.device_class
