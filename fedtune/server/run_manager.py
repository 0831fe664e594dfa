"""Executes submitted runs, one at a time. A run starts when its devices are connected, and restarts if it dies."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.flower.superlink import SuperLink
from fedtune.recipe.refused_attacks import refuse_attacks
from fedtune.recipe.schema import Recipe
from fedtune.server.assignment import assign_devices
from fedtune.server.presence import Presence
from fedtune.server.selection import check_enough_enrolled_devices, is_device_eligible
from fedtune.tracking import DeviceRecord, RunRecord, Store, is_run_active, new_run_id
from fedtune.tracking.rollback import rollback_run

__all__ = ["DEVICE_ENGINE", "RunManager"]

DEVICE_ENGINE = "devices"
_PENDING_SECONDS = 30.0
"""Seconds after which a pending run counts as stuck, because SuperExec is running but does not start it."""
_ATTEMPTS = 8
"""The number of starts without a new round after which a run fails."""
_LONGEST_REST = 60.0


@dataclass
class _Attempt:
    """The current execution of a run: its run id on the SuperLink, and the SuperLink's start count."""

    run: str
    flower_run_id: int
    generation: int
    begun: float = field(default_factory=time.monotonic)
    seen: bool = False


@dataclass
class _Trouble:
    """The starts of a run since its last new round, and the earliest time of the next start."""

    rounds: int
    starts: int = 0
    rest_until: float = 0.0


class RunManager:
    """Executes the runs of the store on a SuperLink. All state is in the store, so a crash loses nothing."""

    def __init__(self, store: Store, superlink: SuperLink, presence: Presence, home: Path, deadline: float) -> None:
        self._store, self._superlink, self._presence = store, superlink, presence
        self._home, self._deadline = home, deadline
        self._attempt: _Attempt | None = None
        self._trouble: dict[str, _Trouble] = {}

    def submit_run(self, recipe: Recipe) -> str:
        """Queue a run and return its id. Every round has a deadline. Raise RecipeError if too few devices qualify."""
        refuse_attacks(recipe)
        check_enough_enrolled_devices(recipe, self._store.access.list_devices())
        federation = recipe.federation
        bounded = federation.model_copy(update={"deadline": federation.deadline or self._deadline})
        run = new_run_id(recipe.name)
        self._store.create_run(
            id=run,
            name=recipe.name,
            recipe=recipe.model_copy(update={"federation": bounded}).model_dump_json(),
            seed=recipe.seed,
            engine=DEVICE_ENGINE,
            rounds_planned=federation.rounds,
            status="queued",
        )
        return run

    def stop_run(self, reference: str) -> str:
        """Stop a run and return its id. Committed rounds are kept."""
        run = self._own(reference)
        if run.status not in ("queued", "running"):
            raise StoreError(f"run {run.id} is {run.status}; there is nothing to stop")
        self._store.finish(run.id, "interrupted", "stopped by an operator")
        return run.id

    def resume_run(self, reference: str) -> str:
        """Queue a run again that is not completed; return its id."""
        run = self._own(reference)
        if run.status in ("queued", "running"):
            raise StoreError(f"run {run.id} is {run.status} already; follow it with fedtune runs watch {run.id}")
        self._store.reopen(run.id, "queued")  # the next tick starts it
        return run.id

    def rollback(self, reference: str, round_number: int) -> tuple[str, int]:
        """Roll a run back to a round; return its id and the number of removed rounds. StoreError if it is running."""
        run = self._own(reference)
        if run.status in ("queued", "running"):
            raise StoreError(f"run {run.id} is {run.status}; stop it first: fedtune runs stop {run.id}")
        removed = rollback_run(self._store, run.id, round_number)
        self._trouble.pop(run.id, None)
        return run.id, removed

    def get_recorded_run(self, run: RunRecord) -> RunRecord:
        """Return a run with its recorded status, which is running between two starts, not interrupted."""
        return next((found for found in self._store.list_unfinished_runs(DEVICE_ENGINE) if found.id == run.id), run)

    def run_of(self, flower_run_id: int) -> str | None:
        """Return the running run with this id on the SuperLink, or None."""
        attempt = self._attempt
        return attempt.run if attempt is not None and attempt.flower_run_id == flower_run_id else None

    def tick(self) -> None:
        """Check the current run, or start the next one. Must be called regularly."""
        if self._attempt is None and not self._superlink.is_superexec_alive():
            self._superlink.stop()  # the maintenance restarts it
            return
        self._attempt = self._begin() if self._attempt is None else self._follow(self._attempt)

    def _own(self, reference: str) -> RunRecord:
        run = self._store.run(reference)
        if run.engine != DEVICE_ENGINE:
            raise StoreError(f"run {run.id} is a simulation of this machine; name a submitted run")
        return self.get_recorded_run(run)

    def _begin(self) -> _Attempt | None:
        """Start the oldest run whose devices are connected.

        They are listed once for all runs: a device that connects meanwhile must not let a newer run overtake.
        """
        runs = self._store.list_unfinished_runs(DEVICE_ENGINE)
        there = self._presence.list_connected_devices(self._store.access.list_devices()) if runs else []
        for run in runs:
            if is_run_active(run.id) or self._resting(run):
                continue
            lacking = self._assign_devices(run, there)
            if lacking is None:
                return self._start(run)
            if run.reason != lacking:
                self._store.set_run_reason(run.id, lacking)
        return None

    def _resting(self, run: RunRecord) -> bool:
        waits = run.status == "running" and run.id in self._trouble  # a run that is queued again does not wait
        return waits and time.monotonic() < self._trouble[run.id].rest_until

    def _assign_devices(self, run: RunRecord, there: Sequence[DeviceRecord]) -> str | None:
        """Assign connected devices to a run; return what is missing, or None."""
        if self._store.access.list_assignments(run.id):
            return None
        recipe = Recipe.model_validate_json(run.recipe)
        needed, select = recipe.num_clients, recipe.federation.selection
        fit = [device for device in there if is_device_eligible(select, device)]
        if len(fit) < needed:
            return f"waits for devices: {len(fit)} of {needed} are connected"
        self._store.access.assign_clients(run.id, assign_devices(recipe, fit))
        return None

    def _start(self, run: RunRecord) -> _Attempt:
        if run.status == "queued":
            self._begin_anew(run)
        flower_run_id = self._superlink.get_control_client().start_run(
            {"run": run.id, "store": "", "home": str(self._home)}
        )
        return _Attempt(run.id, flower_run_id, self._superlink.start_count)

    def _begin_anew(self, run: RunRecord) -> None:
        """Set a queued run to running, and forget its earlier failures."""
        self._store.reopen(run.id)
        self._trouble.pop(run.id, None)

    def _follow(self, attempt: _Attempt) -> _Attempt | None:
        working = is_run_active(
            attempt.run
        )  # before the store is read: a run records its end before it releases the lock
        run = next(
            (found for found in self._store.list_unfinished_runs(DEVICE_ENGINE) if found.id == attempt.run), None
        )
        if run is None:
            if self._store.run(attempt.run).status == "interrupted":
                self._superlink.get_control_client().stop_run(attempt.flower_run_id)
            self._trouble.pop(attempt.run, None)
            return None
        if run.status == "queued":  # stopped and resumed since the last tick; its process continues
            self._begin_anew(run)
        cause = self._explain_loss(attempt, working=working)
        if cause is None:
            attempt.seen |= working
            return attempt
        self._give_up_attempt(attempt, run, cause)
        return None

    def _explain_loss(self, attempt: _Attempt, *, working: bool) -> str | None:
        """Return why an attempt failed; None if it did not."""
        if attempt.generation != self._superlink.start_count:
            return "the SuperLink died"
        found = self._superlink.get_control_client().get_run_status(attempt.flower_run_id)
        if found.status == "finished":
            return found.details or f"the server's process {found.outcome}"
        late = time.monotonic() - attempt.begun > _PENDING_SECONDS
        if found.status == "pending" and (late or not self._superlink.is_superexec_alive()):
            self._superlink.stop()
            return "the SuperLink did not start the run"
        return "the server's process was killed" if attempt.seen and not working else None

    def _give_up_attempt(self, attempt: _Attempt, run: RunRecord, cause: str) -> None:
        if attempt.generation == self._superlink.start_count:
            self._superlink.get_control_client().stop_run(attempt.flower_run_id)
        trouble = self._trouble.get(run.id, _Trouble(run.rounds_completed))
        starts = 1 if run.rounds_completed > trouble.rounds else trouble.starts + 1
        if starts >= _ATTEMPTS:
            self._store.finish(run.id, "failed", f"{cause}; {_ATTEMPTS} starts completed no round")
        else:
            self._store.set_run_reason(run.id, f"{cause}; continues at round {run.rounds_completed + 1}")
        rest = min(_LONGEST_REST, 2.0 ** (starts - 1))  # last, because writing to the store may fail
        self._trouble[run.id] = _Trouble(run.rounds_completed, starts, time.monotonic() + rest)
