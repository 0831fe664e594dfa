"""Finds units by listing a package's folders. Each file publishes one unit; nothing is imported to find it."""

import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from fedtune.errors import RecipeError

__all__ = ["find_unit_modules"]


def find_unit_modules(package: str) -> Mapping[str, str]:
    """Return the module of each unit by its name; RecipeError when two files publish the same name.

    Files and folders with a leading underscore are helpers and are left out. A process lists a folder once.
    """
    return _list_unit_modules(package, tuple(_find_folders(package)))


@lru_cache(maxsize=32)
def _list_unit_modules(package: str, folders: tuple[str, ...]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for module in _iter_public_modules(package, folders):
        name = module.rpartition(".")[2].replace("_", "-")
        if name in found:
            raise RecipeError(f"{found[name]} and {module} both publish {name!r}; rename one of the files")
        found[name] = module
    return MappingProxyType(found)


def _find_folders(package: str) -> Iterable[str]:
    """Return the folders of a package, whether or not it is imported."""
    if package in sys.modules:
        return sys.modules[package].__path__
    spec = find_spec(package)
    assert spec is not None
    return spec.submodule_search_locations or ()


def _iter_public_modules(package: str, folders: Iterable[str]) -> Iterator[str]:
    """Yield the names of modules, including those of inner folders."""
    for folder in folders:
        for _, name, is_package in pkgutil.iter_modules([folder]):
            if not name.startswith("_"):
                module = f"{package}.{name}"
                yield from _iter_public_modules(module, [str(Path(folder, name))]) if is_package else [module]
