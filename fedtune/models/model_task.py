"""The interface of a task that model loading needs."""

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["ModelTask"]


class ModelTask(Protocol):
    """A task as far as it affects the model. Every ``fedtune.tasks.Task`` implements it."""

    @property
    def name(self) -> str:
        """The name in messages, e.g. ``text-classification``."""

    @property
    def auto_class(self) -> str:
        """The transformers class that loads the model with the task's head."""

    @property
    def has_new_head(self) -> bool:
        """Whether the model gets a new head for the labels of the data."""

    @property
    def head_problem(self) -> str | None:
        """The ``problem_type`` of the model's configuration."""

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the settings of the model's configuration that define the head."""

    @property
    def reads_text(self) -> bool:
        """Whether the model's input is tokens."""
