"""The examples in the docstrings of the library, and in its page, run as they are written."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from fedtune import library

MODULES = sorted(found.name for found in pkgutil.iter_modules(library.__path__))
PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples set the home folder and write files."""
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fedtune.library.{name}")).failed == 0


def test_every_function_of_the_library_has_an_example() -> None:
    functions = {"prepare": "prepared_model", "measure": "measured_step", "merge": "model_merge"}
    functions |= {"simulate": "simulated_run", "runs": "recorded_runs", "load_recipe": "recipe_input"}
    for name, module in functions.items():
        found = getattr(importlib.import_module(f"fedtune.library.{module}"), name)
        assert ">>> " in (found.__doc__ or ""), name


def test_the_blocks_of_the_page_run_one_after_the_other() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
