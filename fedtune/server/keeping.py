"""The maintenance thread of a running server: it checks the SuperLink, the runs, the certificates and the audit log."""

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
    """Writes a sentence to the terminal and to the server's log. A repeated sentence is written only once."""

    def __init__(self, log: Log) -> None:
        self._log, self._said = log, ""

    def __call__(self, sentence: str) -> None:
        """Write the sentence unless it equals the last one."""
        if sentence != self._said:
            self._log.write(sentence)
            with suppress(OSError):  # the terminal may be gone
                print(f"fedtune server: {sentence}", file=sys.stderr, flush=True)
        self._said = sentence

    def clear_problem(self) -> None:
        """Forget the last sentence, so that it is written again if the problem returns."""
        self._said = ""


@dataclass
class Health:
    """The health of the server. ``in_order`` is the result of the last check."""

    in_order: bool = True

    def is_healthy(self) -> bool:
        """Return the result of the last check."""
        return self.in_order


@dataclass(frozen=True)
class ServerMaintenance:
    """Checks the SuperLink, the runs, the certificates and the audit log while the server is up."""

    superlink: SuperLink
    manager: RunManager
    certificates: Certificates
    audit: AuditLog
    health: Health
    say: Telling

    def keep_going(self, over: threading.Event) -> None:
        """Check everything at short intervals until ``over`` is set. Errors are logged once; the next check retries."""
        while not over.wait(_TICK_SECONDS):
            try:
                self._look()
                self.health.in_order = True
                self.say.clear_problem()
            except Exception as error:  # the gateway stays up, and the next check retries
                self.health.in_order = False
                self.say(str(error) if isinstance(error, FedtuneError) else traceback.format_exc())

    def _look(self) -> None:
        self.certificates.look()
        if not self.superlink.is_alive():
            self.health.in_order = False
            self.say("the SuperLink ended; it will be restarted")
            self.superlink.stop()
            self.superlink.start()
        self.manager.tick()
        self.superlink.trim()
        self.audit.flush(every=_FLUSH_SECONDS)


@contextmanager
def kept_going(keeper: ServerMaintenance) -> Iterator[None]:
    """Run the maintenance in a thread until the block ends. Then write the counts of the audit log."""
    over = threading.Event()
    thread = threading.Thread(target=keeper.keep_going, args=(over,), name="keeper")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        keeper.audit.flush()
