"""The Flower ServerApp, for tools that look for it here; fedtune's own server loads it from the installed package."""

from fedtune.server.server_app import app

__all__ = ["app"]
