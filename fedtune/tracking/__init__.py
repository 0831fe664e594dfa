"""The run store: what every run did, in tables any SQL database keeps."""

from fedtune.tracking.lock import alive, claim
from fedtune.tracking.records import CheckpointRecord, ContributionRecord, MetricRecord, RoundRecord, RunRecord
from fedtune.tracking.store import Store

__all__ = [
    "CheckpointRecord",
    "ContributionRecord",
    "MetricRecord",
    "RoundRecord",
    "RunRecord",
    "Store",
    "alive",
    "claim",
]
