"""Read, compare and merge downloaded models, and write the result, a few rows at a time."""

from fedtune.offline_merge.compare_models import ModelComparison, compare_models
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.read_config import build_merge_config, parse_merge_config, read_merge_config
from fedtune.offline_merge.run_merge import PreparedMerge, prepare_merge
from fedtune.offline_merge.write_model import write_merged_model

__all__ = [
    "MergeConfig",
    "ModelComparison",
    "PreparedMerge",
    "build_merge_config",
    "compare_models",
    "parse_merge_config",
    "prepare_merge",
    "read_merge_config",
    "write_merged_model",
]
