"""How results come together: one file is one published merge step; they work on deltas, tensor by tensor."""

from fedtune.merging._pipeline import Pipeline, choose, merge, merged_pieces, operands_of
from fedtune.merging._step import Activity, Align, Combine, Evidence, Operand, Relax, Renormalise, Rows, Shape

__all__ = [
    "Activity",
    "Align",
    "Combine",
    "Evidence",
    "Operand",
    "Pipeline",
    "Relax",
    "Renormalise",
    "Rows",
    "Shape",
    "choose",
    "merge",
    "merged_pieces",
    "operands_of",
]
