"""``make quick``: the tests that a change needs, nearest first, until the time is up.

A test file is near a change when its imports lead to a changed module in few steps, or when it names a changed unit or
file. Tests marked ``slow`` or ``deployed`` are left to ``make test`` and ``make test-devices``.

``python -m tests.quick BASE`` compares with the commit BASE; without it, with HEAD, or with HEAD~1 when nothing is
changed since HEAD.
"""

import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

import grimp
import pytest

__all__ = ["TimeBudget", "list_changed_files", "rank_test_files"]

ROOT = Path(__file__).parents[1]
SECONDS = 65.0
"""No test starts later; one that has started takes at most ten seconds more, or it is marked slow."""
MOST_FILES = 40
"""Reading more of them takes longer than is left to run them."""
ALWAYS = Path("tests/test_structure.py")
UNITS = ("fedtune.techniques.", "fedtune.merging.")
"""Packages whose files are found by listing their folders, so that a test need not import the unit that it names."""


class TimeBudget:
    """A plugin of pytest: tests that would start too late do not run, and the summary says how many they are."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.not_run = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.monotonic() < self.end:
            return None
        self.not_run += 1
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.not_run:
            terminalreporter.line(f"time is up: {self.not_run} tests further from the change did not run; make test")


def list_changed_files(base: str | None) -> list[Path]:
    """Paths in the repository that differ from a commit, new files among them."""
    changed = _run_git("diff", "--name-only", base or "HEAD")
    new = _run_git("ls-files", "--others", "--exclude-standard")
    found = changed + new or _run_git("diff", "--name-only", "HEAD~1")
    return [Path(name) for name in sorted(set(found))]


def _run_git(*words: str) -> list[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def rank_test_files(changed: Collection[Path]) -> list[Path]:
    """Test files from which a change can be reached, nearest first; of two alike the one that imports less."""
    steps = _count_steps({_name_module(path) for path in changed if path.suffix == ".py"})
    steps |= {_name_module(path): 1 for path in _list_test_files() if _names_any(path, changed)}
    graph = _build_graph()
    found = [path for path in _list_test_files() if _name_module(path) in steps]

    def measure_distance(path: Path) -> tuple[int, int, Path]:
        module = _name_module(path)
        return steps[module], len(graph.find_modules_directly_imported_by(module)), path

    return sorted(found, key=measure_distance)


def _count_steps(changed: Collection[str]) -> dict[str, int]:
    """For each module that imports a changed one, directly or not: in how many steps."""
    steps: dict[str, int] = {}
    reached, count = set(changed), 0
    while reached:
        steps |= dict.fromkeys(reached, count)
        reached = {user for module in reached for user in _list_users(module)} - steps.keys()
        count += 1
    return steps


def _list_users(module: str) -> Iterator[str]:
    """Modules that import one, and tests that name it when it is a unit."""
    graph = _build_graph()
    if module in graph.modules:
        yield from graph.find_modules_that_directly_import(module)
    if module.startswith(UNITS) and "._" not in module:
        unit = re.compile(rf"\b{re.escape(module.rpartition('.')[2].replace('_', '-'))}\b")
        yield from (_name_module(path) for path in _list_test_files() if unit.search(_read(path)))


def _names_any(test: Path, changed: Collection[Path]) -> bool:
    """Whether a test's text has the name of a changed file that is no module, e.g. a recipe or a page."""
    other = [path for path in changed if path.suffix != ".py" or path.parts[0] not in ("fedtune", "tests")]
    names = {path.name for path in other} | {path.parts[0] for path in other if path.parts[0] == "migrations"}
    return any(name in _read(test) for name in names)


@cache
def _build_graph() -> grimp.ImportGraph:
    return grimp.build_graph("fedtune", "tests", exclude_type_checking_imports=True, cache_dir=None)


@cache
def _list_test_files() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "tests").glob("test_*.py"))


@cache
def _read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _name_module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def main(arguments: Sequence[str]) -> int:
    """Run the tests; the exit status is pytest's."""
    budget = TimeBudget(SECONDS)
    files = rank_test_files(list_changed_files(arguments[0] if arguments else None))
    chosen = list(dict.fromkeys([ALWAYS, *files[:MOST_FILES]]))
    print(f"{len(chosen)} of {len(files)} test files that the change can reach, nearest first", flush=True)
    words = [*map(str, chosen), "-q", "-m", "not slow and not deployed"]
    return int(pytest.main(words, plugins=[budget]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
