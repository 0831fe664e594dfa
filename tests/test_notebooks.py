"""The notebooks run from the first cell to the last, whose own assertions hold; outputs are not kept in them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = (ROOT / "README.md", ROOT / "docs" / "library.md")
LONGEST = 150
"""Seconds that one cell may take on a machine that does other things too."""


_BEGIN = """import os
os.chdir({folder!r})
os.environ["FEDTUNE_HOME"] = {home!r}
%reset -f"""
"""What makes a kernel that has run another notebook a new one, but for the modules it has imported."""


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One kernel for all notebooks, because each would spend most of its time importing the same libraries. Commands in
    notebooks are those of this environment.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    manager = KernelManager()
    manager.start_kernel(env={**os.environ, "PATH": path})
    yield manager
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, home: Path, tmp_path: Path, kernel: KernelManager) -> None:
    """Files that it writes stay in a folder of the test."""
    notebook = nbformat.read(path, as_version=4)
    begin = _BEGIN.format(folder=str(tmp_path), home=str(home))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    client = NotebookClient(notebook, km=kernel, timeout=LONGEST)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()


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
