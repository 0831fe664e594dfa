"""Protection of a run against single clients, and of clients: bounds, quarantine and privacy accounting."""

from collections.abc import Sequence

from fedtune.server.declared import most_examples
from fedtune.server.norm_bound import NormBound
from fedtune.server.privacy_accounting import Spending
from fedtune.server.quarantine import Quarantine
from fedtune.tracking import ClientRecord, RoundRecord, Store
from fedtune.training import RunContext

__all__ = ["Safeguards"]


class Safeguards:
    """The safeguards of one run. ``done`` are its committed rounds."""

    def __init__(self, context: RunContext, store: Store, run: str, done: Sequence[RoundRecord]) -> None:
        self._context, self._store, self._run = context, store, run
        self.bound = NormBound(context.recipe, done)
        self.spending = Spending(context.recipe, done)
        self._quarantine = Quarantine(store.access, run, done)

    def examples(self, client: int) -> int:
        """Return the largest number of examples that a client may report."""
        return most_examples(self._context, self._store, self._run, client)

    def record_commit(self, records: Sequence[ClientRecord]) -> None:
        """Record that a round was committed."""
        self._quarantine.judge(records)
