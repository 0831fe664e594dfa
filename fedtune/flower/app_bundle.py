"""A Flower app that holds no code: it names the apps of the installed fedtune, so nothing is shipped to anybody."""

__all__ = ["RUN_CONFIG_KEYS", "make_app_files"]

RUN_CONFIG_KEYS = ("run", "store", "home")
"""Settings a run of the app gets: the run's id, the URL of its store (empty for the default one), fedtune's home."""

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtune-on-flower"
version = "1.0.0"
description = "fedtune's apps, as installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune_on_flower.server_app:app"
clientapp = "fedtune_on_flower.client_app:app"

[tool.flwr.app.config]
"""


def make_app_files() -> dict[str, bytes]:
    """The app's files by their path in it."""
    settings = "".join(f'{key} = ""\n' for key in RUN_CONFIG_KEYS)
    return {
        "pyproject.toml": f"{_PROJECT}{settings}".encode(),
        "fedtune_on_flower/__init__.py": b"",
        "fedtune_on_flower/server_app.py": _module("from fedtune.server.server_app import app"),
        "fedtune_on_flower/client_app.py": _module("from fedtune.device.client_app import deployed as app"),
    }


def _module(line: str) -> bytes:
    """A module that hands on ``app``."""
    return f'{line}\n\n__all__ = ["app"]\n'.encode()
