"""Measures the memory of a training step."""

from fedtune.memory.heap import release_freed
from fedtune.memory.meter import StorageMeter
from fedtune.memory.process_memory import peak_rss, reset_peak_rss

__all__ = ["StorageMeter", "peak_rss", "release_freed", "reset_peak_rss"]
