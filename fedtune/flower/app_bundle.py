"""A Flower app without code of its own. It imports the apps of the installed fedtune, so no code is sent."""

__all__ = ["RUN_CONFIG_KEYS", "make_app_files"]

RUN_CONFIG_KEYS = ("run", "store", "home")
"""The run config: the run's id, the URL of its store (empty for the default store), and fedtune's home folder."""

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
    """Return the files of the app by their paths."""
    settings = "".join(f'{key} = ""\n' for key in RUN_CONFIG_KEYS)
    return {
        "pyproject.toml": f"{_PROJECT}{settings}".encode(),
        "fedtune_on_flower/__init__.py": b"",
        "fedtune_on_flower/server_app.py": _module("from fedtune.server.server_app import app"),
        "fedtune_on_flower/client_app.py": _module("from fedtune.device.client_app import deployed as app"),
    }


def _module(line: str) -> bytes:
    """Return a module that exports ``app``."""
    return f'{line}\n\n__all__ = ["app"]\n'.encode()
