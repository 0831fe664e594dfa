"""``fedtune server up``: one process that keeps the SuperLink, the door and the runs going until it is told to end."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import uvicorn
from starlette.applications import Starlette

from fedtune import home
from fedtune.errors import FedtuneError, ServerError
from fedtune.tracking import Store
from fedtune.tracking.lock import held
from server.connections import AT_A_TIME, Connections, Listener, peer
from server.door import door
from server.enrolment import Enrolment
from server.forward import Forward
from server.guard import Guard
from server.home import ServerHome
from server.http_line import watched
from server.letting_in import LettingIn
from server.manager import Manager
from server.operating import Operating
from server.presence import Presence
from server.refusal import Audit
from server.reply_limit import allowed
from server.superlink import SuperLink
from server.tls import small_buffers, telling
from server.uploads import Uploads

__all__ = ["up"]

_TICK_SECONDS = 0.25
_FLUSH_SECONDS = 10.0
_MOST_FILES, _OWN_FILES = 1 << 16, 256
"""Open files that are asked for, and those that are not connections."""
_MOST_CONNECTIONS = 2048
"""A TLS connection holds about 100 kB."""
_GARBAGE = 2000, 10, 10
"""Cut connections are cycles that hold their buffers; a command that ends soon may leave them for longer."""


def up(place: ServerHome) -> None:
    """Serve until a signal; ServerError when it cannot begin."""
    if place.settings.store:
        os.environ["FEDTUNE_STORE"] = place.settings.store  # in the environment, since arguments are seen by everybody
    place.renew()
    gc.set_threshold(*_GARBAGE)
    small_buffers()
    # uvicorn ends well on a signal and then raises it again: both must come as an exception, or nothing else ends well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), held(place.lock, 0.5, f"the server in {place.folder} is up already"):
        _serve(place)


def _serve(place: ServerHome) -> None:
    files = _raise_file_limit()
    with _listening(place) as listener, Store.open() as store, _superlink(place) as superlink:
        presence = Presence(lambda: superlink.control().online())
        manager = Manager(store, superlink, presence, home.home(), place.settings.deadline)
        audit = Audit(store.access)
        store.compact()
        total = min(_MOST_CONNECTIONS, (files - _OWN_FILES) // 2)  # each has a line to the SuperLink beside it
        listener.connections = Connections(place.settings.connections, total, _in_background(audit))
        app = _door(place, store, superlink, manager, presence, audit, listener.connections)
        with _kept_going(superlink, manager, audit):
            print(f"fedtune server at {place.settings.url()}", flush=True)
            uvicorn.Server(_config(app, place, audit, listener.connections)).run([listener])


def _raise_file_limit() -> int:
    """Let this process and its children have as many files open as the system allows them; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return min(soft, _MOST_FILES) if soft != resource.RLIM_INFINITY else most


@contextmanager
def _listening(place: ServerHome) -> Iterator[Listener]:
    host, port = place.settings.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family)
        listener = Listener(made.family, made.type, made.proto, fileno=made.detach())
    except OSError as error:
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; change listen in server.yaml") from error
    with listener:
        yield listener


@contextmanager
def _superlink(place: ServerHome) -> Iterator[SuperLink]:
    superlink = SuperLink(place.flower)
    try:
        superlink.start()
        yield superlink
    finally:
        superlink.close()


def _door(
    place: ServerHome,
    store: Store,
    superlink: SuperLink,
    manager: Manager,
    presence: Presence,
    audit: Audit,
    connections: Connections,
) -> Starlette:
    guard, ca = Guard(store.access), place.ca.read_text()
    uploads = Uploads(partial(_reply_limit, manager, place.settings.body_limit))
    forward = Forward(guard, audit, presence, uploads, superlink.socket, place.settings.body_limit)
    enrolment = Enrolment(store.access, guard, audit, superlink.control, ca)
    operating = Operating(store, manager, presence, guard, audit, superlink.control)
    letting = LettingIn(store.access, audit, place.settings.url(), ca)
    return door(guard, audit, forward, enrolment, operating, letting, ca, connections.sweep)


def _reply_limit(manager: Manager, otherwise: int, number: int) -> int:
    """Bytes a reply may have in the run that has a number on the SuperLink."""
    run = manager.run_of(number)
    return (allowed(home.runs() / run) if run else None) or otherwise


def _config(app: Starlette, place: ServerHome, audit: Audit, connections: Connections) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        loop="asyncio",  # its transports close the sockets they are given, which are counted
        http=watched(connections),
        backlog=AT_A_TIME,
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
    tell = _in_background(audit)
    config.ssl.sslobject_class = telling(
        lambda error: tell(peer.get(), f"no TLS connection came about: {error.reason or error}")
    )
    return config


def _in_background(audit: Audit) -> Callable[[str, str], None]:
    """Connections are made and cut in the event loop, which must not wait for the store."""

    def tell(address: str, sentence: str) -> None:
        asyncio.get_running_loop().run_in_executor(None, audit.refused, address, sentence)

    return tell


@contextmanager
def _kept_going(superlink: SuperLink, manager: Manager, audit: Audit) -> Iterator[None]:
    ending = threading.Event()
    keeper = threading.Thread(target=_keep_going, args=(superlink, manager, audit, ending), name="keeper")
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        keeper.join()
        audit.flush()


def _keep_going(superlink: SuperLink, manager: Manager, audit: Audit, ending: threading.Event) -> None:
    """Start the SuperLink again when it died and look after the runs; what goes wrong is said once, and tried again."""
    said = ""
    while not ending.wait(_TICK_SECONDS):
        try:
            if not superlink.alive():
                print("fedtune server: the SuperLink ended; it is started again", file=sys.stderr, flush=True)
                superlink.end()
                superlink.start()
            manager.tick()
            superlink.trim()
            audit.flush(every=_FLUSH_SECONDS)
            said = ""
        except Exception as error:  # whatever it is, the door stays open and the next tick tries again
            told = str(error) if isinstance(error, FedtuneError) else traceback.format_exc()
            if told != said:
                print(f"fedtune server: {told}", file=sys.stderr, flush=True)
            said = told
