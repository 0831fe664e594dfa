"""One process killed with -9 while a deployed round is in a given phase, and started again as an init system would."""

import time
from contextlib import suppress

import psutil

from benchmarks.fleet import Fleet
from benchmarks.phases import Watch, process_of
from benchmarks.scratch_database import Database
from fedtune.errors import StoreError

__all__ = ["kill_in_phase", "until_committed"]

RESTART_SECONDS = 1.0


def kill_in_phase(
    watch: Watch, victim: str, phase: str, rounds: int, patience: float, kept: Database | None
) -> int | None:
    """Kill the victim when a round is in a phase: the round's number, or None when the run's ``rounds`` are over."""
    last = committed(watch)
    until_committed(watch, max(1, last + 1), patience)  # a round in peace between two kills
    for number in range(max(2, last + 2), rounds + 1):
        if hit(watch, victim, phase, number, patience, kept):
            return number
    return None


def hit(watch: Watch, victim: str, phase: str, number: int, patience: float, kept: Database | None) -> bool:
    """Whether the victim was killed while round ``number`` was in a phase; false once the round is over."""
    end = time.monotonic() + patience
    looked = 0
    process = None if kept else process_of(watch.made, victim)
    while time.monotonic() < end:
        looked += 1
        if not looked % 50 and committed(watch) >= number:
            return False
        with suppress(StoreError):
            if watch.at(phase, number) and struck(watch, process, phase, number, kept):
                again(watch.made, kept)
                return True
        if not kept and (process is None or not process.is_running()):
            process = process_of(watch.made, victim)
        time.sleep(0.001)
    raise SystemExit(f"round {number} did not come to {phase}: {watch.made.found(watch.run)['reason']}")


def struck(watch: Watch, process: psutil.Process | None, phase: str, number: int, kept: Database | None) -> bool:
    """Kill the process, if the phase still holds once it stands still."""
    if kept:
        kept.kill()
        return True
    if process is None:
        return False
    try:
        process.suspend()
        if watch.at(phase, number):
            process.kill()
            return True
        process.resume()
    except psutil.NoSuchProcess:
        pass
    return False


def again(made: Fleet, kept: Database | None) -> None:
    """Start what an init system would, a moment later."""
    time.sleep(RESTART_SECONDS)
    if kept:
        kept.start()
    for member in (made.server, *made.devices):
        if not member.up():
            member.start()


def committed(watch: Watch) -> int:
    try:
        return watch.committed()
    except StoreError:
        return -1


def until_committed(watch: Watch, number: int, patience: float) -> None:
    """Wait for round ``number``, at most ``patience`` seconds, and no longer than the run goes on."""
    end = time.monotonic() + patience
    while committed(watch) < number:
        if time.monotonic() > end or watch.store.run(watch.run).status in ("failed", "completed"):
            return
        time.sleep(0.05)
