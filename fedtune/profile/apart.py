"""A process for each case: resident memory never falls, so whoever comes second would be told the first one's peak."""

import multiprocessing
import signal
from multiprocessing.connection import Connection

from fedtune.errors import FedtuneError
from fedtune.profile.case import Case
from fedtune.profile.measure import measure
from fedtune.profile.row import Failed, Row

__all__ = ["attempt", "measure_apart"]


def measure_apart(case: Case) -> Row:
    """Measure in a fresh process; whatever goes wrong in it ends as one sentence."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, case), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it leaves Ctrl-C to this process
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sending.close()
    try:
        row: Row = receiving.recv()
    except EOFError:
        row = Failed(case.technique, "its process was killed, perhaps for want of memory; try a smaller batch")
    finally:
        process.kill()
        process.join()
    return row


def _answer(sending: Connection, case: Case) -> None:
    sending.send(attempt(case))


def attempt(case: Case) -> Row:
    """Measure in this process: the figures, or why there are none."""
    try:
        return measure(case)
    except FedtuneError as error:
        return Failed(case.technique, str(error))
    except Exception as error:
        return Failed(case.technique, _sentence(error))


def _sentence(error: Exception) -> str:
    """A fault nobody foresaw, with what torch says when memory is short put plainly."""
    first = str(error).partition("\n")[0].strip()
    if isinstance(error, MemoryError) or "can't allocate memory" in first:
        return "a step needs more memory than this machine has; try a smaller batch"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
