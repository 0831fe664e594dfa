"""What loading a model needs to know of the task that it is loaded for."""

from typing import Protocol

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
    def has_classes(self) -> bool:
        """Whether the head has one output for each class of the data."""

    @property
    def reads_text(self) -> bool:
        """Whether the model reads tokens."""
