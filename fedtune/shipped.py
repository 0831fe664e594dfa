"""Folders that ship with the package: migration scripts, and the files with which servers and devices are deployed.

In a checkout they stand at the top level, beside ``fedtune``; a wheel holds them as ``fedtune/shipped/NAME``.
"""

from pathlib import Path
from string import Template

__all__ = ["SHIPPED", "fill_template", "shipped_folder"]

SHIPPED = ("server", "clients", "migrations")
"""The folders by name."""
_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """The folder of that name, of the wheel or of the checkout from which fedtune is imported."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def fill_template(path: str, **values: object) -> str:
    """The text of a file in a shipped folder, e.g. ``server/server.yaml``, with its ``${placeholders}`` filled in."""
    name, _, inside = path.partition("/")
    return Template((shipped_folder(name) / inside).read_text(encoding="utf-8")).substitute(values)
