"""TIES: trim small changes, elect a sign for each entry, average those that have it.

What: keep the floor(density * n) largest |x| of each tensor, with ``rescale`` stretched until sum |x| is what it was;
  the sign of sum_i w_i x_i wins, a tie counts as plus; the entries of that sign are averaged by weight (summed when
  ``normalise`` is off), times scale.
Memory: one piece per model and 4 MB, or 16 MB of deltas over all models; a tensor's deltas are read once where those
  hold them, twice up to a million entries, else three times; ``rescale`` reads them twice more.
Use when: several fine-tunes of one base disagree in sign on many entries, so that adding cancels what they learned.
Avoid when: there are one or two models or signs agree: trimming then only loses. Density 0.2 suits larger models best.
Adapters: refused where clients send one factor of a product (lora alternating or with A frozen): entries of a factor
  win or lose as the product is cut into factors, so that equal products merge into different ones.
Source: Yadav et al. (arXiv 2306.01708), algorithm 1. Trims each tensor where the paper trims the whole model, and
  weights multiply before the election, as in mergekit; its density default is 1, which `fedtune merge` takes; a
  round's is the paper's 0.2.
"""

from typing import ClassVar

from fedtune.merging._select import Stream, count_entries_to_keep, keep_largest
from fedtune.merging._span import Normalise
from fedtune.merging._task_vectors import Density, Trimmed

__all__ = ["Ties"]


class Ties(Trimmed):
    """Trim, elect, average."""

    name: ClassVar[str] = "ties"
    elects_sign: ClassVar[bool] = True
    density: Density = 0.2
    normalise: Normalise = True

    def select_entries(self, stream: Stream, size: int) -> Stream:
        """The largest entries."""
        return keep_largest(stream, count_entries_to_keep(self.density, size), size)
