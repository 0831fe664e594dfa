"""What loading a model needs to know of the task that it is loaded for."""

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["ModelTask"]


class ModelTask(Protocol):
    """A task, as far as it shapes the model: each ``fedtune.tasks.Task`` is one."""

    @property
    def name(self) -> str:
        """The name in messages, e.g. ``text-classification``."""

    @property
    def auto_class(self) -> str:
        """The transformers class that loads the model with the task's head."""

    @property
    def has_new_head(self) -> bool:
        """Whether the model gets a head for the labels of the data."""

    @property
    def head_problem(self) -> str | None:
        """The ``problem_type`` of the model's configuration."""

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """Settings of the model's configuration that make the head."""

    @property
    def reads_text(self) -> bool:
        """Whether the model reads tokens."""
