"""The run store: what every run did, in tables any SQL database keeps."""

from fedtune.tracking.access_control import Access
from fedtune.tracking.database import default_url, file_url
from fedtune.tracking.records import (
    Assignment,
    AuditRecord,
    CheckpointRecord,
    ClientRecord,
    ClientScore,
    DeviceRecord,
    MetricRecord,
    OperatorRecord,
    RoundRecord,
    RunRecord,
    TokenRecord,
)
from fedtune.tracking.run_lock import claim_run, is_run_active
from fedtune.tracking.store import Store, new_run_id

__all__ = [
    "Access",
    "Assignment",
    "AuditRecord",
    "CheckpointRecord",
    "ClientRecord",
    "ClientScore",
    "DeviceRecord",
    "MetricRecord",
    "OperatorRecord",
    "RoundRecord",
    "RunRecord",
    "Store",
    "TokenRecord",
    "claim_run",
    "default_url",
    "file_url",
    "is_run_active",
    "new_run_id",
]
