import gc
import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedtune.memory import (
    MemoryWatch,
    peak_anonymous,
    peak_rss,
    process_memory,
    read_resident_memory,
    reset_peak_rss,
)


def test_the_process_peak_sees_an_allocation_and_a_reset_forgets_it() -> None:
    megabytes = 2**20
    gc.collect()
    reset_peak_rss()
    before = peak_rss()
    block = torch.ones(200 * megabytes, dtype=torch.uint8)
    with_block = peak_rss()
    del block
    remembered = peak_rss()
    reset_peak_rss()
    assert 190 * megabytes < with_block - before < 260 * megabytes
    assert remembered - before > 190 * megabytes
    assert peak_rss() - before < 50 * megabytes


def usage(peak: int) -> SimpleNamespace:
    return SimpleNamespace(ru_maxrss=peak)


@pytest.mark.parametrize(("platform", "bytes_each"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_without_proc_the_systems_own_unit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, bytes_each: int
) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "nothing")
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda _: usage(123_456))
    assert peak_rss() == 123_456 * bytes_each


def test_a_status_without_a_high_water_mark_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(process_memory, "_STATUS", status)
    monkeypatch.setattr("resource.getrusage", lambda _: usage(7))
    status.write_text("Name:\tpython\nVmRSS:\t 100 kB\n")
    assert peak_rss() == 7 * 1024
    status.write_text("Name:\tpython\nVmHWM:\t 100 kB\nVmRSS:\t 50 kB\n")
    assert peak_rss() == 100 * 1024


MEGABYTES = 2**20
LINUX = pytest.mark.skipif(read_resident_memory() is None, reason="the system does not tell the parts apart")


@LINUX
def test_a_mapped_file_counts_as_file_backed_and_a_tensor_as_anonymous(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1" * (64 * MEGABYTES))
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with MemoryWatch() as watch:
            first = read_resident_memory()
            assert sum(mapped[::4096]) > 0
            # Not of the heap, which may hold free blocks that are resident.
            fresh = mmap.mmap(-1, 32 * MEGABYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            held = torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
        assert held.numel()
    assert first is not None
    assert watch.anonymous is not None
    assert watch.file_backed is not None
    assert 20 * MEGABYTES < watch.anonymous - first.anonymous < 40 * MEGABYTES  # other blocks come and go
    assert 60 * MEGABYTES < watch.file_backed - first.file_backed < 70 * MEGABYTES


@LINUX
def test_a_peak_between_two_looks_is_found() -> None:
    with MemoryWatch(seconds=100) as watch:
        before = read_resident_memory()
        torch.ones(200 * MEGABYTES, dtype=torch.uint8)
        peak = peak_anonymous()
    assert before is not None
    assert peak is not None
    assert watch.anonymous is not None
    assert 190 * MEGABYTES < peak - before.anonymous < 260 * MEGABYTES
    assert abs(watch.anonymous - peak) < 20 * MEGABYTES


def test_the_memory_of_a_process_that_ended_is_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as done:
        done.wait()
    assert read_resident_memory(done.pid) is None


def test_without_the_parts_there_are_no_peaks_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "nothing")
    with MemoryWatch() as watch:
        pass
    assert (watch.anonymous, watch.file_backed, peak_anonymous()) == (None, None, None)
