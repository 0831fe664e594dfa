"""Fine-tunes from anywhere read, compared, merged and written, a few rows at a time."""

from fedtune.fusion.compare import ModelComparison, compare
from fedtune.fusion.config import MergeConfig
from fedtune.fusion.config_file import build_merge_config, parse_merge_config, read_merge_config
from fedtune.fusion.fuse import PreparedMerge, prepare_merge
from fedtune.fusion.result import write_merged_model

__all__ = [
    "MergeConfig",
    "ModelComparison",
    "PreparedMerge",
    "build_merge_config",
    "compare",
    "parse_merge_config",
    "prepare_merge",
    "read_merge_config",
    "write_merged_model",
]
