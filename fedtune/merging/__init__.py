"""How results come together: one file is one published merge step; they work on deltas, tensor by tensor."""

from fedtune.merging._by_activity import ByActivity, Measurement, measurement, outshone
from fedtune.merging._differences import cosine_table, opposed, scale_that_keeps_length
from fedtune.merging._increments import (
    Increment,
    Increments,
    add_increments,
    join_increments,
    split_increments,
)
from fedtune.merging._measured import StatisticsFile
from fedtune.merging._pipeline import (
    Merged,
    Pipeline,
    choose,
    errors,
    merge,
    merge_round,
    merged_pieces,
    operands_of,
    settle,
)
from fedtune.merging._ranks import narrowed, widened
from fedtune.merging._staleness import staleness_scale
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
    "Increment",
    "Increments",
    "Measurement",
    "Merged",
    "Operand",
    "Pipeline",
    "Relax",
    "Renormalise",
    "Rows",
    "Settled",
    "Shape",
    "Statistics",
    "StatisticsFile",
    "add_increments",
    "choose",
    "cosine_table",
    "errors",
    "join_increments",
    "measurement",
    "merge",
    "merge_round",
    "merged_pieces",
    "narrowed",
    "operands_of",
    "opposed",
    "outshone",
    "scale_that_keeps_length",
    "settle",
    "split_increments",
    "staleness_scale",
    "widened",
]
