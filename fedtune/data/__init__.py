"""Where examples come from, how they are parted and split over clients, and how they become tensors."""

from fedtune.data.column import Values
from fedtune.data.corpus import Corpus, everything, load, training
from fedtune.data.encode import Encoded, encode
from fedtune.data.split import split
from fedtune.data.summary import Holding, Summary, summary
from fedtune.data.table import Table

__all__ = [
    "Corpus",
    "Encoded",
    "Holding",
    "Summary",
    "Table",
    "Values",
    "encode",
    "everything",
    "load",
    "split",
    "summary",
    "training",
]
