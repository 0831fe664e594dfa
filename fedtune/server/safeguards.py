"""What keeps one client from harming a run, or from being harmed: bounds, quarantine, and what was told so far."""

from collections.abc import Sequence

from fedtune.server.declared import most_examples
from fedtune.server.norm_bound import NormBound
from fedtune.server.privacy_accounting import Spending
from fedtune.server.quarantine import Quarantine
from fedtune.tracking import ClientRecord, RoundRecord, Store
from fedtune.training import RunContext

__all__ = ["Safeguards"]


class Safeguards:
    """Those of one run; ``done`` are its committed rounds, which a resumed run goes on from."""

    def __init__(self, context: RunContext, store: Store, run: str, done: Sequence[RoundRecord]) -> None:
        self._context, self._store, self._run = context, store, run
        self.bound = NormBound(context.recipe, done)
        self.spending = Spending(context.recipe, done)
        self._quarantine = Quarantine(store.access, run, done)

    def examples(self, client: int) -> int:
        """The most examples that a client's report may count."""
        return most_examples(self._context, self._store, self._run, client)

    def record_commit(self, records: Sequence[ClientRecord]) -> None:
        """A round has been committed."""
        self._quarantine.judge(records)
