"""Fine-tunes from anywhere read, compared, merged and written, a few rows at a time."""

from fedtune.fusion.compare import Comparison, compare
from fedtune.fusion.config import MergeConfig
from fedtune.fusion.config_file import parse, quick, read
from fedtune.fusion.fuse import Merge, prepare
from fedtune.fusion.result import merge

__all__ = ["Comparison", "Merge", "MergeConfig", "compare", "merge", "parse", "prepare", "quick", "read"]
