"""The run store: the rounds, metrics and clients of every run, in tables of any SQL database."""

from fedtune.tracking.access_control import Access
from fedtune.tracking.database import get_default_url, make_file_url
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
    SampleRecord,
    TokenRecord,
)
from fedtune.tracking.run_lock import claim_run, is_run_active
from fedtune.tracking.store import Store, new_run_id
from fedtune.tracking.task_records import TaskRecord, TaskScore

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
    "SampleRecord",
    "Store",
    "TaskRecord",
    "TaskScore",
    "TokenRecord",
    "claim_run",
    "get_default_url",
    "is_run_active",
    "make_file_url",
    "new_run_id",
]
