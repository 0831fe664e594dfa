"""A pass over a mapped Arrow file holds a bounded part of it, and reads the same values."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fedtune.data.arrow import Arrow
from fedtune.data.mapped_pages import iter_arrow_mappings

_PASS = """
import sys
import pyarrow as pa
from fedtune.data.arrow import Arrow
from fedtune.memory.process_memory import MemoryWatch, read_resident_memory
column = Arrow(pa.ipc.open_file(pa.memory_map(sys.argv[1])).read_all()["column"])
next(column.iter_values())
began = read_resident_memory().file_backed
with MemoryWatch(0.001) as watch:
    total = sum(len(value) for value in column.iter_values())
print(total, watch.file_backed - began)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_pass_over_a_mapped_file_holds_a_part_of_it(tmp_path: Path) -> None:
    file, count, size = tmp_path / "texts.arrow", 20_000, 12_000
    schema = pa.schema([("column", pa.string())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, count, 1000):
            texts = [f"{row:08}" + "x" * (size - 8) for row in range(start, start + 1000)]
            writer.write_batch(pa.record_batch([pa.array(texts)], schema=schema))
    told = subprocess.run([sys.executable, "-c", _PASS, file], check=True, capture_output=True, text=True).stdout
    total, held = map(int, told.split())
    assert total == count * size == 240_000_000
    assert held < 110_000_000  # the limit, a thousand values and what the kernel reads ahead


def test_values_stay_what_they_are_when_pages_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.data.mapped_pages._count_file_backed", iter(range(0, 1 << 40, 1 << 30)).__next__)
    schema = pa.schema([("column", pa.string())])
    file = tmp_path / "texts.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([f"text {row}" for row in range(2500)])], schema=schema))
    mapped = pa.ipc.open_file(pa.memory_map(str(file))).read_all()["column"]
    held = Arrow(pa.chunked_array([pa.array([f"text {row}" for row in range(2500)])]))
    column = Arrow(mapped, np.arange(0, 2500, 2))
    assert list(column.iter_values()) == held.values()[::2]
    assert Arrow(mapped).values() == held.values()


def test_only_arrow_files_that_cannot_be_written_are_dropped() -> None:
    maps = """\
7f00-7f10 r--s 00000000 fe:00 12   /home/a b/texts.arrow
7f10-7f20 rw-s 00000000 fe:00 12   /home/texts.arrow
7f20-7f30 r--p 00000000 fe:00 12   /usr/lib/libc.so
7f30-7f40 rw-p 00000000 00:00 0
7f40-7f50 r--p 00000000 fe:00 12   /home/more.arrow
"""
    assert list(iter_arrow_mappings(maps)) == [(0x7F00, 0x10), (0x7F40, 0x10)]
