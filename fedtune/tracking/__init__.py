"""The run store: what every run did, in tables any SQL database keeps."""

from fedtune.tracking.access import Access
from fedtune.tracking.lock import alive, claim
from fedtune.tracking.records import (
    AuditRecord,
    CheckpointRecord,
    ContributionRecord,
    DeviceRecord,
    MetricRecord,
    OperatorRecord,
    RoundRecord,
    RunRecord,
    Seat,
    TokenRecord,
)
from fedtune.tracking.store import Store

__all__ = [
    "Access",
    "AuditRecord",
    "CheckpointRecord",
    "ContributionRecord",
    "DeviceRecord",
    "MetricRecord",
    "OperatorRecord",
    "RoundRecord",
    "RunRecord",
    "Seat",
    "Store",
    "TokenRecord",
    "alive",
    "claim",
]
