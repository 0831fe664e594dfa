"""Units by name: each file of a package, or of a folder inside it, publishes one. Nothing is imported to find them."""

import pkgutil
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from fedtune.errors import RecipeError

__all__ = ["find_unit_modules"]


def find_unit_modules(package: str) -> dict[str, str]:
    """The module of each unit, by the unit's name; RecipeError when two files publish the same name.

    Names of files and folders with a leading underscore do not count: they help units.
    """
    found: dict[str, str] = {}
    for module in _iter_public_modules(package, _find_folders(package)):
        name = module.rpartition(".")[2].replace("_", "-")
        if name in found:
            raise RecipeError(f"{found[name]} and {module} both publish {name!r}; rename one of the files")
        found[name] = module
    return found


def _find_folders(package: str) -> Iterable[str]:
    """The folders of a package, which may have been imported or not."""
    if package in sys.modules:
        return sys.modules[package].__path__
    spec = find_spec(package)
    assert spec is not None
    return spec.submodule_search_locations or ()


def _iter_public_modules(package: str, folders: Iterable[str]) -> Iterator[str]:
    """Names of modules, those of inner folders too."""
    for folder in folders:
        for _, name, is_package in pkgutil.iter_modules([folder]):
            if not name.startswith("_"):
                module = f"{package}.{name}"
                yield from _iter_public_modules(module, [str(Path(folder, name))]) if is_package else [module]
