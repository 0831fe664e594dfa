"""Joint training: every round trains on the examples of all tasks. It is the ceiling of training by gradients.

What: the same rounds and the same steps as the stream, but all examples from the first round on. It shows what
forgetting costs, and cannot be run on devices whose old examples are gone: it is a reference for simulations. Its loss
compares all labels, also with ``setting: task`` or ``loss: new``.
"""

from typing import ClassVar

from fedtune.continual._method import ContinualMethod

__all__ = ["Joint"]


class Joint(ContinualMethod):
    """Train on all tasks at once."""

    name: ClassVar[str] = "joint"
    uses_all_tasks: ClassVar[bool] = True
