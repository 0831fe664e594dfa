"""The run store: what every run did, in tables any SQL database keeps."""

from fedtune.tracking.access import Access
from fedtune.tracking.database import default_url, file_url
from fedtune.tracking.lock import alive, claim
from fedtune.tracking.records import (
    AuditRecord,
    CheckpointRecord,
    ClientScore,
    ContributionRecord,
    DeviceRecord,
    MetricRecord,
    OperatorRecord,
    RoundRecord,
    RunRecord,
    Seat,
    TokenRecord,
)
from fedtune.tracking.store import Store, new_run_id

__all__ = [
    "Access",
    "AuditRecord",
    "CheckpointRecord",
    "ClientScore",
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
    "default_url",
    "file_url",
    "new_run_id",
]
