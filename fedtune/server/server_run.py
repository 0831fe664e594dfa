"""What every round of one run uses."""

from dataclasses import dataclass

from fedtune.server.client_scoring import ClientScoring
from fedtune.server.safeguards import Safeguards
from fedtune.server.scheduling.round_scheduler import RoundScheduler
from fedtune.server.sending import Sending
from fedtune.tracking import Store
from fedtune.training import RunContext

__all__ = ["ServerRun"]


@dataclass(frozen=True)
class ServerRun:
    """A run as its server carries it out: the run context, the store, and what rounds share."""

    run_id: str
    context: RunContext
    store: Store
    scheduler: RoundScheduler
    safeguards: Safeguards
    sending: Sending
    scoring: ClientScoring
