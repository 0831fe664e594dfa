"""The Flower ClientApp of a device, for tools that look for it here; ``fedtune device join`` needs no such file."""

from fedtune.device.client_app import deployed as app

__all__ = ["app"]
