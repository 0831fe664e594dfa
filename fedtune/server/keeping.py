"""What goes on beside the door while a server is up: SuperLink, runs, certificates and audit are looked after."""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fedtune.errors import FedtuneError
from fedtune.flower.superlink import SuperLink
from fedtune.logs import Log
from fedtune.server.certificates import Certificates
from fedtune.server.gateway.refusal import AuditLog
from fedtune.server.run_manager import RunManager

__all__ = ["Health", "ServerMaintenance", "Telling", "kept_going"]

_TICK_SECONDS = 0.25
_FLUSH_SECONDS = 10.0


class Telling:
    """Says a sentence in the terminal and in the server's log, once until another one is said."""

    def __init__(self, log: Log) -> None:
        self._log, self._said = log, ""

    def __call__(self, sentence: str) -> None:
        """Say it, unless it was said last."""
        if sentence != self._said:
            self._log.write(sentence)
            with suppress(OSError):  # the terminal may be gone
                print(f"fedtune server: {sentence}", file=sys.stderr, flush=True)
        self._said = sentence

    def clear_problem(self) -> None:
        """Whatever was said before is over; said again, it is news."""
        self._said = ""


@dataclass
class Health:
    """Whether what the door stands before works: ``in_order`` is how the last look ended."""

    in_order: bool = True

    def is_healthy(self) -> bool:
        """How the last look ended."""
        return self.in_order


@dataclass(frozen=True)
class ServerMaintenance:
    """Looks after the SuperLink, the runs, the certificates and the audit while the server is up."""

    superlink: SuperLink
    manager: RunManager
    certificates: Certificates
    audit: AuditLog
    health: Health
    say: Telling

    def keep_going(self, over: threading.Event) -> None:
        """Look after everything every moment; what goes wrong is said once, and tried again."""
        while not over.wait(_TICK_SECONDS):
            try:
                self._look()
                self.health.in_order = True
                self.say.clear_problem()
            except Exception as error:  # whatever it is, the door stays open and the next tick tries again
                self.health.in_order = False
                self.say(str(error) if isinstance(error, FedtuneError) else traceback.format_exc())

    def _look(self) -> None:
        self.certificates.look()
        if not self.superlink.is_alive():
            self.health.in_order = False
            self.say("the SuperLink ended; it is started again")
            self.superlink.stop()
            self.superlink.start()
        self.manager.tick()
        self.superlink.trim()
        self.audit.flush(every=_FLUSH_SECONDS)


@contextmanager
def kept_going(keeper: ServerMaintenance) -> Iterator[None]:
    """Look after everything in a thread of its own until the block ends; then write what the audit counted."""
    over = threading.Event()
    thread = threading.Thread(target=keeper.keep_going, args=(over,), name="keeper")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        keeper.audit.flush()
