"""Whether this processor computes the bits of the one that made a stored run. Libraries choose kernels by processor."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.tracking import Store


def skip_on_other_bits(home: Path, run: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test if this processor repeats a stored round with other bits. ``home`` is a copy: it is changed."""
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    stored = read_hash(run, number)
    for words in (("runs", "rollback", run, "--round", str(number - 1), "--yes"), ("simulate", "--resume", run)):
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    if (repeated := read_hash(run, number)) != stored:
        pytest.skip(f"this processor repeats round {number} with other bits: {repeated[:8]}, not {stored[:8]}")


def read_hash(run: str, number: int) -> str:
    """Return the SHA-256 of a round's checkpoint."""
    with Store.open() as store:
        found = next(one for one in store.rounds(run) if one.number == number).checkpoint
    assert found is not None
    return found.sha256
