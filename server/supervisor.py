"""``fedtune server up``: one process that keeps the SuperLink, the door and the runs going until it is told to end."""

import asyncio
import os
import signal
import socket
import ssl
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette

from fedtune import home
from fedtune.errors import FedtuneError, ServerError
from fedtune.tracking import Store
from fedtune.tracking.lock import held
from server.certificates import Certificates, ending
from server.door import door
from server.enrolment import Enrolment
from server.forward import Forward
from server.guard import Guard
from server.home import ServerHome
from server.logs import Log, Logs
from server.manager import Manager
from server.operating import Operating
from server.presence import Presence
from server.recipe_check import RecipeCheck
from server.refusal import Audit
from server.superlink import SuperLink
from server.tls import telling

__all__ = ["up"]

_TICK_SECONDS = 0.25


def up(place: ServerHome) -> None:
    """Serve until a signal; ServerError when it cannot begin."""
    if place.settings.store:
        os.environ["FEDTUNE_STORE"] = place.settings.store  # in the environment, since arguments are seen by everybody
    # uvicorn ends well on a signal and then raises it again: both must come as an exception, or nothing else ends well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal it was started in may go; the server stays
    lock = held(place.lock, 0.5, f"the server in {place.folder} is up already")
    with suppress(KeyboardInterrupt), lock, Log(place.folder / "server.log") as log:
        place.renew()
        _serve(place, _Telling(log))


class _Telling:
    """Says a sentence in the terminal and in the server's log, once until another one is said."""

    def __init__(self, log: Log) -> None:
        self._log, self._said = log, ""

    def __call__(self, sentence: str) -> None:
        if sentence != self._said:
            self._log.write(sentence)
            with suppress(OSError):  # the terminal may be gone
                print(f"fedtune server: {sentence}", file=sys.stderr, flush=True)
        self._said = sentence

    def well(self) -> None:
        """Whatever was said before is over; said again, it is news."""
        self._said = ""


def _serve(place: ServerHome, say: _Telling) -> None:
    with (
        _listening(place) as listener,
        Store.open() as store,
        _superlink(place) as superlink,
        closing(RecipeCheck()) as check,
    ):
        presence = Presence(lambda: superlink.control().online())
        manager = Manager(store, superlink, presence, home.home(), place.settings.deadline)
        audit = Audit(store.access)
        healthy = Health()
        config = _config(_door(place, store, superlink, manager, presence, audit, healthy, check), place, audit)
        assert config.ssl is not None
        keeper = _Keeper(superlink, manager, Certificates(place, config.ssl, say), healthy, say)
        with _kept_going(keeper):
            say(f"up at {place.settings.url()}")
            for sentence in ending(place):
                say(sentence)
            uvicorn.Server(config).run([listener])
    say("stopped")


@contextmanager
def _listening(place: ServerHome) -> Iterator[socket.socket]:
    host, port = place.settings.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; change listen in server.yaml") from error
    with listener:
        yield listener


@contextmanager
def _superlink(place: ServerHome) -> Iterator[SuperLink]:
    superlink = SuperLink(place)
    try:
        superlink.start()
        yield superlink
    finally:
        superlink.end()


def _door(
    place: ServerHome,
    store: Store,
    superlink: SuperLink,
    manager: Manager,
    presence: Presence,
    audit: Audit,
    health: "Health",
    check: RecipeCheck,
) -> Starlette:
    guard, ca = Guard(store.access), place.ca.read_text()
    forward = Forward(guard, audit, presence, lambda: superlink.address, ca.encode(), place.settings.body_limit)
    enrolment = Enrolment(store.access, guard, audit, superlink.control, ca)
    operating = Operating(store, manager, presence, guard, audit, superlink.control, place.settings.url(), ca, check)
    return door(guard, audit, forward, enrolment, operating, ca, health.told, Logs(place.folder))


def _config(app: Starlette, place: ServerHome, audit: Audit) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        ssl_certfile=str(place.certificate),
        ssl_keyfile=str(place.key),
    )
    config.load()
    assert config.ssl is not None
    config.ssl.sslobject_class = telling(_in_background(audit))
    return config


def _in_background(audit: Audit) -> Callable[[ssl.SSLError], None]:
    """Handshakes happen in the event loop, which must not wait for the store."""

    def tell(error: ssl.SSLError) -> None:
        sentence = f"no TLS connection came about: {error.reason or error}"
        asyncio.get_running_loop().run_in_executor(None, audit.refused, "unknown", sentence)

    return tell


@contextmanager
def _kept_going(keeper: "_Keeper") -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=keeper.keep_going, args=(over,), name="keeper")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Health:
    """Whether what the door stands before works: ``in_order`` is how the last look ended."""

    in_order: bool = True

    def told(self) -> bool:
        """How the last look ended."""
        return self.in_order


@dataclass(frozen=True)
class _Keeper:
    """Looks after the SuperLink, the runs and the certificates while the server is up."""

    superlink: SuperLink
    manager: Manager
    certificates: Certificates
    health: Health
    say: _Telling

    def keep_going(self, over: threading.Event) -> None:
        """Look after everything every moment; what goes wrong is said once, and tried again."""
        while not over.wait(_TICK_SECONDS):
            try:
                self._look()
                self.health.in_order = True
                self.say.well()
            except Exception as error:  # whatever it is, the door stays open and the next tick tries again
                self.health.in_order = False
                self.say(str(error) if isinstance(error, FedtuneError) else traceback.format_exc())

    def _look(self) -> None:
        self.certificates.look()
        due = self.certificates.superlink_is_due(self.manager.idle)
        if due or not self.superlink.alive():
            self.health.in_order = False
            self.say("the SuperLink " + ("gets the new certificate" if due else "ended") + "; it is started again")
            self.superlink.end()
            self.superlink.start()
        self.manager.tick()
