"""What keeps one client from harming a run: bounds on its updates, and quarantine for a device that keeps failing."""

from collections.abc import Sequence

from fedtune.errors import RoundError
from fedtune.tracking import ContributionRecord, RoundRecord, Seat, Store
from fedtune.training import Workshop
from server.declared import most_examples
from server.norm_bound import NormBound
from server.quarantine import Quarantine

__all__ = ["Safeguards"]


class Safeguards:
    """Those of one run; ``done`` are its committed rounds, which a resumed run goes on from."""

    def __init__(
        self, shop: Workshop, store: Store, run: str, seats: Sequence[Seat], done: Sequence[RoundRecord]
    ) -> None:
        self._shop, self._store, self._run = shop, store, run
        self.bound = NormBound(shop.recipe, done)
        self._quarantine = Quarantine(store.access, seats, done)

    def examples(self, client: int) -> int:
        """The most examples that a client's report may count."""
        return most_examples(self._shop, self._store, self._run, client)

    def committed(self, records: Sequence[ContributionRecord]) -> None:
        """A round has been committed."""
        self._quarantine.judge(records)

    def shut_out(self) -> set[int]:
        """The clients that are not to be asked now; RoundError when too few others are left for a round."""
        recipe = self._shop.recipe
        out = self._quarantine.clients()
        if out and recipe.clients - len(out) < recipe.federation.quorum:
            names = ", ".join(self._quarantine.names(out))
            raise RoundError(
                f"quarantine leaves {recipe.clients - len(out)} clients, fewer than federation.quorum "
                f"{recipe.federation.quorum}: look after {names}, then fedtune server release, then runs resume"
            )
        return out
