"""The child process that reads what needs transformers."""

import sys
import time
from pathlib import Path

import pytest

from fedtune.errors import ModelError
from fedtune.models import child_work


def test_a_child_that_takes_too_long_is_ended_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = f"import pathlib, time; pathlib.Path({str(tmp_path / 'half')!r}).touch(); time.sleep(60)"
    monkeypatch.setattr(child_work, "make_isolated_command", lambda *_: [sys.executable, "-c", waits])
    monkeypatch.setattr(child_work, "LIMIT_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"model\.gguf was not read within 2 seconds"):
        child_work.run_in_child("describe-gguf", "model.gguf", tmp_path)
    assert time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())
