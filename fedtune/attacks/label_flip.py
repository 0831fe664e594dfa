"""Label flip: train on wrong classes.

What: of L classes, an example of class l counts as one of class L - 1 - l. The client trains and sends as an honest one
does. With an odd number of classes, the middle one stays.
Defaults: none to set.
Use when: the clients themselves are not hostile, but their data are wrong.
Avoid when: a merge should be tested against what a hostile client can do: this attack is weak.
Source: the label flip of Fang et al. (arXiv 1911.11815), who take it from earlier work.
"""

from typing import ClassVar

from torch import Tensor

from fedtune.attacks._attack import Attack

__all__ = ["LabelFlip"]


class LabelFlip(Attack):
    """Reverses the order of the classes."""

    name: ClassVar[str] = "label-flip"
    changes_labels: ClassVar[bool] = True

    def change_labels(self, labels: Tensor, num_labels: int) -> Tensor:
        """L - 1 - l."""
        return num_labels - 1 - labels
