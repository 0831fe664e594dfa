"""A case in a process of its own."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedtune.memory import read_resident_memory
from fedtune.profiling import FailedProfile, ProfileCase, StepProfile, profile_in_subprocess
from tests.profile_examples import a_case, a_recipe, tiny_bert

pytestmark = pytest.mark.slow


def die(sending: Connection, case: ProfileCase) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_fresh_process_tells_its_own_peak(tmp_path: Path) -> None:
    row = profile_in_subprocess(a_case(a_recipe(tiny_bert(tmp_path)), "full"))
    assert isinstance(row, StepProfile)
    assert 50 * 2**20 < row.loaded_bytes <= row.rss_bytes
    assert 0 < row.kept_bytes <= row.peak_bytes < row.rss_bytes
    assert row.allocator
    if read_resident_memory() is None:
        pytest.skip("the system does not tell the parts apart")
    assert row.anonymous_bytes is not None
    assert row.file_bytes is not None
    assert row.loaded_anonymous_bytes is not None
    assert 50 * 2**20 < row.loaded_anonymous_bytes <= row.anonymous_bytes <= row.rss_bytes
    assert 20 * 2**20 < row.file_bytes < row.rss_bytes


def test_a_process_that_is_killed_leaves_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.profiling.isolated_process._send_result", die)
    row = profile_in_subprocess(a_case(a_recipe(tmp_path), "full"))
    assert row == FailedProfile("full", "its process was killed, perhaps because memory was short; try a smaller batch")
