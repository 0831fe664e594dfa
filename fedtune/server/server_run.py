"""The objects that every round of a run uses."""

from dataclasses import dataclass

from fedtune.server.client_scoring import ClientScoring
from fedtune.server.drift_watch import DriftWatch
from fedtune.server.early_stopping import EarlyEnd
from fedtune.server.root_data import RootData
from fedtune.server.safeguards import Safeguards
from fedtune.server.scheduling.round_scheduler import RoundScheduler
from fedtune.server.sending import Sending
from fedtune.server.task_memory import TaskMemory
from fedtune.tracking import Store
from fedtune.training import RunContext

__all__ = ["ServerRun"]


@dataclass(frozen=True)
class ServerRun:
    """A run on its server: the run context, the store, and the objects that rounds share."""

    run_id: str
    context: RunContext
    store: Store
    scheduler: RoundScheduler
    safeguards: Safeguards
    sending: Sending
    scoring: ClientScoring
    memory: TaskMemory
    drift: DriftWatch
    early_end: EarlyEnd
    root_data: RootData | None = None
