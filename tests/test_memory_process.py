import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedtune.memory import peak_rss, process_memory, reset_peak_rss


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
