"""Measures the memory of a training step."""

from fedtune.memory.accelerator_memory import (
    AcceleratorMemory,
    read_accelerator_peak,
    read_allocated_bytes,
    reset_accelerator_peak,
)
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.memory.heap import release_freed
from fedtune.memory.meter import StorageMeter
from fedtune.memory.process_memory import (
    MemoryWatch,
    ResidentMemory,
    peak_anonymous,
    peak_rss,
    read_resident_memory,
    reset_peak_rss,
)

__all__ = [
    "AcceleratorMemory",
    "MemoryWatch",
    "ResidentMemory",
    "StorageMeter",
    "fix_mmap_threshold",
    "peak_anonymous",
    "peak_rss",
    "read_accelerator_peak",
    "read_allocated_bytes",
    "read_resident_memory",
    "release_freed",
    "reset_accelerator_peak",
    "reset_peak_rss",
]
