"""The quick lane: which tests a change needs, and that it ends in time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.quick import TimeBudget, rank_test_files


def names(*changed: str) -> list[str]:
    return [path.stem for path in rank_test_files([Path(path) for path in changed]) if path.stem != Path(__file__).stem]


def importers(words: str) -> set[str]:
    """Test files with an import of these words, by searching their text; this file names them all."""
    files = Path(__file__).parent.glob("test_*.py")
    return {path.stem for path in files if words in path.read_text()} - {Path(__file__).stem}


def test_tests_that_import_a_changed_module_come_before_those_that_reach_it_by_others() -> None:
    found, direct = names("fedtune/server/roster.py"), importers("from fedtune.server.roster import")
    assert direct == {"test_roster"}
    assert found[0] == "test_roster"
    assert len(found) > 10


def test_a_changed_test_comes_first_and_a_changed_helper_brings_its_users() -> None:
    assert names("tests/test_sparse.py", "fedtune/merging/combine/task_vectors/ties.py")[0] == "test_sparse"
    users = importers("from tests.tiny import")
    assert len(users) > 3
    assert set(names("tests/tiny.py")[: len(users)]) == users


def test_a_unit_is_reached_by_its_name_though_nothing_imports_it() -> None:
    assert "test_adapters_rounds" in names("fedtune/merging/combine/low_rank/fedex_lora.py")
    assert not {"test_yaml_text", "test_packing"} & set(names("fedtune/merging/combine/low_rank/fedex_lora.py"))


def test_a_page_a_recipe_and_a_migration_are_reached_by_their_names() -> None:
    assert "test_readme" in names("README.md")
    assert "test_package" in names("server/fedtune-server.service")
    assert "test_store_schema" in names("migrations/versions/0001_baseline.py")
    assert names("LICENSE") == []


def test_a_test_that_would_start_too_late_does_not_run_and_is_counted() -> None:
    item = cast("pytest.Item", SimpleNamespace())
    early, late = TimeBudget(60), TimeBudget(-1)
    assert early.pytest_runtest_protocol(item) is None
    assert late.pytest_runtest_protocol(item) is True
    lines: list[str] = []
    reporter: Any = SimpleNamespace(line=lines.append)
    early.pytest_terminal_summary(reporter)
    late.pytest_terminal_summary(reporter)
    assert lines == ["time is up: 1 tests further from the change did not run; make test"]
