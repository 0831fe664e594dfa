"""How results come together: one file is one published merge step; they work on deltas, tensor by tensor."""

from fedtune.merging._pipeline import choose, merge

__all__ = ["choose", "merge"]
