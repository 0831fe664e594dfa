"""Memory that is freed and taken again is not cleared page by page each time."""

import os
import subprocess
import sys

import pytest

from fedtune.memory.heap import keep_freed_memory

SCRIPT = """
import resource, sys
import torch
from fedtune.memory.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        held = [torch.zeros(1 << 18) for _ in range(10)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults()
print(faults())
"""
FIRST_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""Those that glibc begins with; it then raises them by what it sees freed, more or less far."""


def faults(way: str, environment: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_blocks_that_come_and_go_are_cleared_once() -> None:
    assert faults("kept", {}) < 1_000
    assert faults("given back", FIRST_SETTINGS) > 50_000


def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not keep_freed_memory()
