"""Which base weights each client of a run holds, and what leads from them to those of a round.

Merges of pairs and base write into the weights beside the pairs. Who trained in a merged round holds the base that the
round began with; who has not yet, builds the run's first one from the recipe.
"""

from collections.abc import Sequence
from pathlib import Path

from fedtune import checkpoint, techniques
from fedtune.merging import Increment, Increments
from fedtune.server.base_log import BaseLog
from fedtune.server.class_payloads import State
from fedtune.tracking import ClientRecord, RoundRecord
from fedtune.training import RunContext
from fedtune.wire.masked_weights import mask_name

__all__ = ["Bases"]


class Bases:
    """Those of one run, whose increments rest in ``folder``; ``start`` is the state of round 0.

    What a client holds is told from the committed rounds alone, so that a resumed run sends what it would have sent.
    """

    def __init__(self, context: RunContext, folder: Path, start: State, done: Sequence[RoundRecord]) -> None:
        pairs = techniques.list_low_rank_pairs(context.techniques, context.model)
        self.names = [pair.base for pair in pairs if pair.base is not None and mask_name(pair.base) not in start]
        self._log = BaseLog(folder)
        self._log.forget(done[-1].number + 1 if done else 0)
        self._start = self._digest(start)
        self._digests: dict[int, str | None] = {}
        self._merged: dict[int, int] = {}
        for record in done:
            self._note(record.number, record.client_records)
        self._bytes = sum(start[name].nbytes for name in self.names)
        self._log.trim(self._bytes)

    def digest(self, round_number: int, state: State) -> str | None:
        """The digest of the base in ``state``, with which a round begins; None if the base is not tracked."""
        if round_number not in self._digests:
            self._digests[round_number] = self._digest(state)
        return self._digests[round_number]

    def get_held_digest(self, client: int) -> str | None:
        """The digest of the base that a client holds; None where that cannot be told."""
        if not self.names:
            return None
        return self._log.get_digest_before(self._merged[client]) if client in self._merged else self._start

    def increments(self, held: str, base: str | None) -> list[dict[str, Increment]] | None:
        """Round by round what leads from a base that is held to the one of now; None without a way."""
        chain = None if base is None else self._log.list_rounds_between(held, base)
        return None if chain is None else [one.increments for one in chain]

    def record_merge(self, round_number: int, before: State, after: State, increments: Increments) -> None:
        """Keep what a round added to the base, which is about to be committed."""
        if increments:
            began, ended = self.digest(round_number, before), self._digest(after)
            assert began is not None  # increments are of base weights, whose digest is kept
            assert ended is not None
            self._log.save(round_number, began, ended, increments)

    def record_commit(self, round_number: int, records: Sequence[ClientRecord]) -> None:
        """A round has been committed."""
        self._note(round_number, records)
        self._log.trim(self._bytes)

    def _note(self, round_number: int, records: Sequence[ClientRecord]) -> None:
        self._merged |= dict.fromkeys((one.client for one in records if one.status == "merged"), round_number)

    def _digest(self, state: State) -> str | None:
        return checkpoint.hash_tensors({name: state[name] for name in self.names}) if self.names else None
