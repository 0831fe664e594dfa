"""The notebooks run from the first cell to the last, whose own assertions hold; outputs are not kept in them."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = (ROOT / "README.md", ROOT / "docs" / "library.md")
LONGEST = 150
"""Seconds that one cell may take on a machine that does other things too."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that it writes stay in a folder of the test, and commands in it are those of this environment."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_checks_its_values(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("assert " in cell.source for cell in code) >= len(code) // 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_every_notebook(page: Path) -> None:
    assert len(NOTEBOOKS) == 3
    text = page.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"({path.relative_to(page.parent)})" in text
