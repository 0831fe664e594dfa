"""Simulates a federation on one machine: the unmodified Flower apps on an in-process grid.

``flower_engine`` runs them on Flower's own engine. Import it only where it is needed.
"""

from fedtune.simulation.in_process_engine import choose_worker_count, run_in_process
from fedtune.training.resolve import resolve_recipe

__all__ = ["choose_worker_count", "resolve_recipe", "run_in_process"]
