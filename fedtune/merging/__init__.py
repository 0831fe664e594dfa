"""Merge steps turn the deltas of several models into one delta. Each step is one file in a folder of its family."""

from fedtune.merging._activation_statistics import (
    ActivationSums,
    InputChannels,
    average_activations,
    check_merge_has_targets,
    find_input_channels,
    measure_activation_statistics,
    sum_activations,
)
from fedtune.merging._delta_comparison import compute_cosine_matrix, compute_norm_preserving_scale, count_opposing_signs
from fedtune.merging._increments import (
    Increment,
    Increments,
    add_increments,
    join_increments,
    split_increments,
)
from fedtune.merging._input_hooks import Batch, hook_layer_inputs
from fedtune.merging._pair_ranks import pad_to_rank, truncate_to_rank
from fedtune.merging._pipeline import (
    Merged,
    bind_combine,
    build_client_inputs,
    measure_averaging_errors,
    merge_client_updates,
    merge_round,
    merge_row_chunks,
)
from fedtune.merging._pipeline_steps import MergePipeline, build_pipeline
from fedtune.merging._staleness import compute_staleness_weight
from fedtune.merging._step import (
    ActivationStatistics,
    AlignStep,
    BoundCombine,
    CombineStep,
    MergeContext,
    MergeInput,
    RelaxStep,
    RenormaliseStep,
    RowReader,
    ServerOptimiserStep,
    Shape,
    StatisticsReader,
)
from fedtune.merging.combine._statistics_file import StatisticsFile
from fedtune.merging.combine.robust.fltrust import FlTrust
from fedtune.merging.relax._activation_step import (
    ActivationRelaxStep,
    CalibrationRequest,
    build_calibration_request,
    find_dominated_weights,
)

__all__ = [
    "ActivationRelaxStep",
    "ActivationStatistics",
    "ActivationSums",
    "AlignStep",
    "Batch",
    "BoundCombine",
    "CalibrationRequest",
    "CombineStep",
    "FlTrust",
    "Increment",
    "Increments",
    "InputChannels",
    "MergeContext",
    "MergeInput",
    "MergePipeline",
    "Merged",
    "RelaxStep",
    "RenormaliseStep",
    "RowReader",
    "ServerOptimiserStep",
    "Shape",
    "StatisticsFile",
    "StatisticsReader",
    "add_increments",
    "average_activations",
    "bind_combine",
    "build_calibration_request",
    "build_client_inputs",
    "build_pipeline",
    "check_merge_has_targets",
    "compute_cosine_matrix",
    "compute_norm_preserving_scale",
    "compute_staleness_weight",
    "count_opposing_signs",
    "find_dominated_weights",
    "find_input_channels",
    "hook_layer_inputs",
    "join_increments",
    "measure_activation_statistics",
    "measure_averaging_errors",
    "merge_client_updates",
    "merge_round",
    "merge_row_chunks",
    "pad_to_rank",
    "split_increments",
    "sum_activations",
    "truncate_to_rank",
]
