"""TIES: trim small changes, elect a sign for each entry, and average the entries with that sign.

What: keep the floor(density * n) largest |x| of each tensor; with ``rescale``, stretch them until sum |x| is as before.
The sign of sum_i w_i x_i wins; a tie counts as plus. The entries with that sign are averaged by weight (summed when
``normalise`` is off), times scale.
Memory: one chunk per model and 4 MB, or 16 MB of deltas over all models. If a tensor fits into these, its deltas are
read once; otherwise twice up to a million entries, and three times above. ``rescale`` reads them twice more.
Use when: several fine-tunes of one base disagree in sign at many entries, so that a sum cancels what they learned.
Avoid when: there are one or two models, or signs agree. Trimming then only loses information. Density 0.2 fits larger
models best.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by sign or size, but one product can be written with different factors, so equal updates would give different
results.
Source: Yadav et al. (arXiv 2306.01708), algorithm 1. It trims each tensor; the paper trims the whole model. As in
mergekit, weights multiply before the election. mergekit's default density is 1, which `fedtune merge` uses; a round
uses the paper's 0.2.
"""

from typing import ClassVar

from fedtune.merging.combine._weights import Normalise
from fedtune.merging.combine.task_vectors._magnitude_selection import Stream, count_entries_to_keep, keep_largest
from fedtune.merging.combine.task_vectors._task_vector_step import Density, Trimmed

__all__ = ["Ties"]


class Ties(Trimmed):
    """Trims small entries, elects signs and averages the rest."""

    name: ClassVar[str] = "ties"
    elects_sign: ClassVar[bool] = True
    density: Density = 0.2
    normalise: Normalise = True

    def select_entries(self, stream: Stream, size: int) -> Stream:
        """The largest entries."""
        return keep_largest(stream, count_entries_to_keep(self.density, size), size)
