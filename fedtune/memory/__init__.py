"""Measures the memory of a training step."""

from fedtune.memory.accelerator_memory import (
    AcceleratorMemory,
    read_accelerator_peak,
    read_allocated_bytes,
    reset_accelerator_peak,
)
from fedtune.memory.heap import release_freed
from fedtune.memory.meter import StorageMeter
from fedtune.memory.process_memory import peak_rss, reset_peak_rss

__all__ = [
    "AcceleratorMemory",
    "StorageMeter",
    "peak_rss",
    "read_accelerator_peak",
    "read_allocated_bytes",
    "release_freed",
    "reset_accelerator_peak",
    "reset_peak_rss",
]
