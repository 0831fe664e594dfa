"""``fedtune server up``: one process that keeps the SuperLink, the door and the runs going until it is told to end."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import uvicorn
from starlette.applications import Starlette

from fedtune import paths
from fedtune.flower.reply_limit import read_reply_limit
from fedtune.flower.superlink import SuperLink
from fedtune.logs import Log, Logs
from fedtune.server.certificates import Certificates, describe_authority_expiry
from fedtune.server.gateway.access_api import LettingIn
from fedtune.server.gateway.application import make_gateway
from fedtune.server.gateway.authentication import Authenticator
from fedtune.server.gateway.connections import Connections
from fedtune.server.gateway.device_api import DeviceApi
from fedtune.server.gateway.listening import config_of, connections_of, open_listening_socket
from fedtune.server.gateway.operator_api import OperatorApi
from fedtune.server.gateway.refusal import AuditLog
from fedtune.server.gateway.reverse_proxy import ReverseProxy
from fedtune.server.gateway.tls_errors import small_buffers
from fedtune.server.gateway.uploads import Uploads
from fedtune.server.keeping import Health, ServerMaintenance, Telling, kept_going
from fedtune.server.presence import Presence
from fedtune.server.recipe_check_process import RecipeCheckProcess
from fedtune.server.run_manager import RunManager
from fedtune.server.server_home import ServerHome
from fedtune.tracking import Store
from fedtune.tracking.run_lock import hold_file_lock

__all__ = ["run_server"]

_GARBAGE = 2000, 10, 10
"""Cut connections are cycles that hold their buffers; a command that ends soon may leave them for longer."""


def run_server(place: ServerHome) -> None:
    """Serve until a signal; ServerError when it cannot begin."""
    if place.settings.store:
        os.environ["FEDTUNE_STORE"] = place.settings.store  # in the environment, since arguments are seen by everybody
    gc.set_threshold(*_GARBAGE)
    small_buffers()
    # uvicorn ends well on a signal and then raises it again: both must come as an exception, or nothing else ends well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal it was started in may go; the server stays
    lock = hold_file_lock(place.lock_file, 0.5, f"the server in {place.folder} is up already")
    with suppress(KeyboardInterrupt), lock, Log(place.folder / "server.log") as log:
        place.renew_certificate()
        _serve(place, Telling(log))


def _serve(place: ServerHome, say: Telling) -> None:
    with (
        open_listening_socket(place) as listener,
        Store.open() as store,
        _superlink(place) as superlink,
        closing(RecipeCheckProcess()) as check,
    ):
        presence = Presence(lambda: superlink.get_control_client().list_online_nodes())
        manager = RunManager(store, superlink, presence, paths.get_home_folder(), place.settings.default_deadline)
        audit, health = AuditLog(store.access), Health()
        store.compact()
        listener.connections = connections_of(place, audit)
        app = _door(place, store, superlink, manager, presence, audit, health, check, listener.connections)
        config = config_of(app, place, audit, listener.connections)
        assert config.ssl is not None
        keeper = ServerMaintenance(superlink, manager, Certificates(place, config.ssl, say), audit, health, say)
        with kept_going(keeper):
            say(f"up at {place.settings.get_public_url()}")
            for sentence in describe_authority_expiry(place):
                say(sentence)
            uvicorn.Server(config).run([listener])
    say("stopped")


@contextmanager
def _superlink(place: ServerHome) -> Iterator[SuperLink]:
    superlink = SuperLink(place.flower_home)
    try:
        superlink.start()
        yield superlink
    finally:
        superlink.close()


def _door(
    place: ServerHome,
    store: Store,
    superlink: SuperLink,
    manager: RunManager,
    presence: Presence,
    audit: AuditLog,
    health: Health,
    check: RecipeCheckProcess,
    connections: Connections,
) -> Starlette:
    guard, ca = Authenticator(store.access), place.ca_file.read_text()
    uploads = Uploads(partial(_reply_limit, manager, place.settings.body_limit))
    forward = ReverseProxy(guard, audit, presence, uploads, superlink.socket, place.settings.body_limit)
    enrolment = DeviceApi(store.access, guard, audit, superlink.get_control_client, ca)
    operating = OperatorApi(store, manager, presence, guard, audit, superlink.get_control_client, check)
    letting = LettingIn(store.access, audit, place.settings.get_public_url(), ca)
    logs = Logs(place.folder)
    return make_gateway(
        guard, audit, forward, enrolment, operating, letting, ca, health.is_healthy, logs, connections.sweep
    )


def _reply_limit(manager: RunManager, otherwise: int, number: int) -> int:
    """Bytes a reply may have in the run that has a number on the SuperLink."""
    run = manager.run_of(number)
    return (read_reply_limit(paths.get_runs_folder() / run) if run else None) or otherwise
