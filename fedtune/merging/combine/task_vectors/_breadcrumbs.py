"""The base class of the breadcrumbs steps, which remove the largest and the smallest entries."""

from abc import ABC
from math import floor

from pydantic import Field

from fedtune.merging.combine.task_vectors._magnitude_selection import Stream, count_entries_to_keep, keep_magnitude_band
from fedtune.merging.combine.task_vectors._task_vector_step import Density, Trimmed

__all__ = ["BreadcrumbsCombineStep"]


class BreadcrumbsCombineStep(Trimmed, ABC):
    """A band of magnitudes."""

    density: Density = 0.9
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the largest entries that is dropped")

    def select_entries(self, stream: Stream, size: int) -> Stream:
        """floor(density * n) entries below the floor(gamma * n) largest, fewer of which go where both do not fit."""
        keep = count_entries_to_keep(self.density, size)
        top = min(floor(self.gamma * size), size - keep)
        return keep_magnitude_band(stream, top, top + keep, size)
