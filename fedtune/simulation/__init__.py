"""A federation on one machine: the unmodified Flower apps on an in-process grid, or on Flower's own engine."""

from fedtune.simulation.flower_engine import run_flower
from fedtune.simulation.local import default_workers, run_local
from fedtune.simulation.resolve import resolve

__all__ = ["default_workers", "resolve", "run_flower", "run_local"]
