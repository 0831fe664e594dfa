"""Reading data sources, splitting and partitioning the examples, and encoding them as tensors."""

from fedtune.data.column import Values
from fedtune.data.encoded_dataset import EncodedDataset
from fedtune.data.examples import SourceCounts
from fedtune.data.load import DataSplits, limit_examples, load_all_examples, load_data, load_trainable_examples
from fedtune.data.partition import partition_examples, partition_task
from fedtune.data.partition_plug_in import Partition, check_partition
from fedtune.data.partition_summary import ClientExamples, PartitionSummary, summarise_partition
from fedtune.data.table import Table

__all__ = [
    "ClientExamples",
    "DataSplits",
    "EncodedDataset",
    "Partition",
    "PartitionSummary",
    "SourceCounts",
    "Table",
    "Values",
    "check_partition",
    "limit_examples",
    "load_all_examples",
    "load_data",
    "load_trainable_examples",
    "partition_examples",
    "partition_task",
    "summarise_partition",
]
