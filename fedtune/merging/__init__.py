"""How results come together: one file is one published merge step; they work on deltas, tensor by tensor."""

from fedtune.merging._by_activity import ByActivity, Measurement, measurement, outshone
from fedtune.merging._measured import StatisticsFile
from fedtune.merging._pipeline import Pipeline, choose, errors, merge, merged_pieces, operands_of, settle
from fedtune.merging._step import (
    Activity,
    Align,
    Combine,
    Evidence,
    Operand,
    Relax,
    Renormalise,
    Rows,
    Settled,
    Shape,
    Statistics,
)

__all__ = [
    "Activity",
    "Align",
    "ByActivity",
    "Combine",
    "Evidence",
    "Measurement",
    "Operand",
    "Pipeline",
    "Relax",
    "Renormalise",
    "Rows",
    "Settled",
    "Shape",
    "Statistics",
    "StatisticsFile",
    "choose",
    "errors",
    "measurement",
    "merge",
    "merged_pieces",
    "operands_of",
    "outshone",
    "settle",
]
