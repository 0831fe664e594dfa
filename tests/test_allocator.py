"""Memory follows the tensors that are held: blocks are returned when they are freed, whatever was freed before."""

import os
import subprocess
import sys

import pytest

from fedtune.memory import allocator
from fedtune.memory.allocator import fix_mmap_threshold

SCRIPT = """
import sys
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.memory.process_memory import read_resident_memory

print(fix_mmap_threshold() if sys.argv[1] == "fixed" else "left")
for _ in range(2):
    bytearray(b"1") * (24 << 20)  # freed at once: by itself, glibc now keeps blocks of this size in the heap
before = read_resident_memory().anonymous
held = [bytearray(b"1") * (1 << 20) for _ in range(128)]
kept = held[-1]
del held
print(read_resident_memory().anonymous - before)
"""
GLIBC = pytest.mark.skipif(allocator._read_glibc_version() is None, reason="glibc's setting")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


def run(way: str, **environment: str) -> tuple[str, float]:
    """Return what was set, and the megabytes that stay when one of 128 blocks of a megabyte is held."""
    command = [sys.executable, "-c", SCRIPT, way]
    done = subprocess.run(command, env=CLEAN | environment, capture_output=True, text=True, check=True)
    said, left = done.stdout.splitlines()
    return said, int(left) / 2**20


@GLIBC
def test_one_block_that_is_held_does_not_keep_those_that_were_freed() -> None:
    said, left = run("fixed")
    assert said.startswith("glibc ")
    assert said.endswith("blocks from 64 KiB mapped")
    assert left < 3
    assert run("left")[1] > 100


@GLIBC
@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_setting_of_the_user_holds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1000" if name == "GLIBC_TUNABLES" else "1000")
    assert fix_mmap_threshold().endswith("as set in the environment")


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.confstr", lambda _: None)
    assert fix_mmap_threshold() == "the system's, as it is"


def test_a_preloaded_allocator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_PRELOADED", {"malloc_trim": "jemalloc"})
    assert fix_mmap_threshold() == "jemalloc, as it is"
