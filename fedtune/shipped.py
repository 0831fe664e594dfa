"""Folders shipped with the package: migration scripts, and files to deploy servers and devices.

In a checkout they are at the top level, beside ``fedtune``. In a wheel they are ``fedtune/shipped/NAME``.
"""

from pathlib import Path
from string import Template

__all__ = ["SHIPPED", "fill_template", "shipped_folder"]

SHIPPED = ("server", "clients", "migrations")
"""The names of the folders."""
_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """Return the folder of that name, in the wheel or in the checkout that fedtune is imported from."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def fill_template(path: str, **values: object) -> str:
    """Return a file of a shipped folder, e.g. ``server/server.yaml``, with its ``${placeholders}`` filled in."""
    name, _, inside = path.partition("/")
    return Template((shipped_folder(name) / inside).read_text(encoding="utf-8")).substitute(values)
