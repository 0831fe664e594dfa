"""Asks about classes of large packages without importing them: nothing is an instance of a class that is not loaded."""

import sys
from typing import Any

__all__ = ["find_loaded_class", "is_loaded_instance"]


def find_loaded_class(module: str, name: str) -> Any:
    """Return a class if its module is imported already; None otherwise."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def is_loaded_instance(value: object, module: str, name: str) -> bool:
    """Whether a value is an instance of a class, which it cannot be before the module is imported."""
    kind = find_loaded_class(module, name)
    return kind is not None and isinstance(value, kind)
