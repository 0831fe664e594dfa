"""Track which base weights each client of a run holds, and the increments from them to those of a round.

Some merges of low-rank pairs also write into the base weights. A client whose update was merged in a round holds the
base weights from the start of this round. Other clients build the first ones from the recipe.
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
    """The base weights of one run. ``folder`` contains the increments; ``start`` is the state of round 0.

    What a client holds depends only on the committed rounds, so that a resumed run sends the same payloads.
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
        """Return the digest of the base weights in a round's start ``state``; None if they are not tracked."""
        if round_number not in self._digests:
            self._digests[round_number] = self._digest(state)
        return self._digests[round_number]

    def get_held_digest(self, client: int) -> str | None:
        """Return the digest of the base weights that a client holds; None if it is unknown."""
        if not self.names:
            return None
        return self._log.get_digest_before(self._merged[client]) if client in self._merged else self._start

    def get_merged_round(self, client: int) -> int:
        """Return the last committed round whose merge used an update of a client; 0 if there is none."""
        return self._merged.get(client, 0)

    def increments(self, held: str, base: str | None) -> list[dict[str, Increment]] | None:
        """Return the increments per round from the ``held`` base weights to ``base``; None if some are missing."""
        chain = None if base is None else self._log.list_rounds_between(held, base)
        return None if chain is None else [one.increments for one in chain]

    def record_merge(self, round_number: int, before: State, after: State, increments: Increments) -> None:
        """Save the increments of a round before it is committed."""
        if increments:
            began, ended = self.digest(round_number, before), self._digest(after)
            assert began is not None  # base weights with increments are tracked
            assert ended is not None
            self._log.save(round_number, began, ended, increments)

    def record_commit(self, round_number: int, records: Sequence[ClientRecord]) -> None:
        """Record that a round was committed."""
        self._note(round_number, records)
        self._log.trim(self._bytes)

    def _note(self, round_number: int, records: Sequence[ClientRecord]) -> None:
        self._merged |= dict.fromkeys((one.client for one in records if one.status == "merged"), round_number)

    def _digest(self, state: State) -> str | None:
        return checkpoint.hash_tensors({name: state[name] for name in self.names}) if self.names else None
