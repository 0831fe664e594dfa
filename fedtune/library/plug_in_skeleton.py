"""A new installable package with one method in it: a ``pyproject.toml``, a module and a test."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template

from fedtune.errors import RecipeError, StoreError
from fedtune.library.method_list import list_methods
from fedtune.library.plug_in_templates import MODULES, PROJECT, TEST

__all__ = ["KINDS", "write_plug_in"]

KINDS: Mapping[str, str] = {
    "technique": "fedtune.techniques",
    "task": "fedtune.tasks",
    "merge-step": "fedtune.merging",
}
"""What can be written, and its group of entry points."""
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_plug_in(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the package into a new folder and return its files.

    RecipeError for a name that is taken or that no recipe could have, StoreError if the folder exists.
    """
    if _NAME.fullmatch(name) is None:
        raise RecipeError(f"{name!r} is no name for a {kind}; write small letters, digits and hyphens, e.g. my-{kind}")
    if name in [known for _, known in list_methods()]:
        raise RecipeError(f"there is a method {name!r} already; choose another name")
    if folder.exists():
        raise StoreError(f"{folder} exists already; choose another folder with -o")
    written = _fill_templates(kind, name)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        for path, text in written.items():
            (beside / path).parent.mkdir(exist_ok=True)
            (beside / path).write_text(text, encoding="utf-8")
        beside.chmod(0o755)
        beside.replace(folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror}; free or choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [folder / path for path in written]


def _fill_templates(kind: str, name: str) -> dict[str, str]:
    """The files by their path in the package."""
    words = name.split("-")
    values = {
        "name": name,
        "module": f"fedtune_{'_'.join(words)}",
        "class_name": "".join(word.capitalize() for word in words),
        "title": " ".join(words).capitalize(),
        "group": KINDS[kind],
    }
    files = {
        "pyproject.toml": PROJECT,
        f"{values['module']}.py": MODULES[kind],
        f"tests/test_{values['module']}.py": TEST,
    }
    return {path: Template(text).substitute(values) for path, text in files.items()}
