"""What every test may count on: a home of its own, samples fetched once, nothing reported to anybody."""

import gc
import os
import shutil
import signal
from pathlib import Path

import pytest

from fedtune.paths import get_cache_folder

_SETTINGS = {
    "FEDTUNE_CACHE": str(get_cache_folder()),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait for the next small operation sleep: spinning took two thirds of the processor time.
    "OMP_WAIT_POLICY": "PASSIVE",
}

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

# Runs flush each file to the disk, which tests need not wait for: their folders lie in memory where there is room.
_MEMORY, _ROOM = Path("/dev/shm"), 6 << 30
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# Tests that a shell runs in the background inherit that Ctrl-C is ignored, and so would the commands they send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first, so that no process works at one of them alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what was imported for the tests out of garbage collection: to look through it takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, which holds the default store and the runs; sources still come from the common cache."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDTUNE_STORE", raising=False)
    return tmp_path / "home"
