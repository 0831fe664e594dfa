"""A federation on one machine: the unmodified Flower apps on an in-process grid.

``flower_engine`` runs them on Flower's own engine; whoever wants that imports it.
"""

from fedtune.simulation.local import default_workers, run_local
from fedtune.simulation.resolve import resolve

__all__ = ["default_workers", "resolve", "run_local"]
