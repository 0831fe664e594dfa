"""Memory that is freed and taken again is not cleared page by page each time."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from fedtune.memory.heap import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    held = [torch.zeros(1 << 19) for _ in range(4)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_blocks_that_come_and_go_are_cleared_once() -> None:
    assert faults("kept") < 5_000
    assert faults("given back") > 10 * faults("kept")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.memory.heap import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not keep_freed_memory()
