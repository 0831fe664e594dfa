"""``fedtune server up``: one process runs the SuperLink, the gateway and the runs until a signal."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import uvicorn

from fedtune import paths
from fedtune.flower.reply_limit import read_reply_limit
from fedtune.flower.superlink import SuperLink
from fedtune.logs import Log, Logs
from fedtune.server.certificates import Certificates, describe_authority_expiry
from fedtune.server.gateway.access_api import AccessApi
from fedtune.server.gateway.application import GatewayServices, make_gateway
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
"""Thresholds of the garbage collector. Closed connections are reference cycles that keep their buffers."""


def run_server(home: ServerHome) -> None:
    """Serve until a signal; raise ServerError if the server cannot start."""
    if home.settings.store:
        os.environ["FEDTUNE_STORE"] = home.settings.store  # not an argument, which every user can see
    gc.set_threshold(*_GARBAGE)
    small_buffers()
    # uvicorn shuts down on a signal and raises it again. As an exception, it lets the rest shut down too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the server continues when its terminal closes
    lock = hold_file_lock(home.lock_file, 0.5, f"the server in {home.folder} is up already")
    with suppress(KeyboardInterrupt), lock, Log(home.folder / "server.log") as log:
        home.renew_certificate()
        _serve(home, Telling(log))


@dataclass(frozen=True)
class _ServerParts:
    """The parts of a running server."""

    home: ServerHome
    store: Store
    superlink: SuperLink
    presence: Presence
    manager: RunManager
    recipe_check: RecipeCheckProcess
    audit: AuditLog
    health: Health
    connections: Connections


def _serve(home: ServerHome, log: Telling) -> None:
    with (
        open_listening_socket(home) as listener,
        Store.open() as store,
        _superlink(home) as superlink,
        closing(RecipeCheckProcess()) as recipe_check,
    ):
        presence = Presence(lambda: superlink.get_control_client().list_online_nodes())
        manager = RunManager(store, superlink, presence, paths.get_home_folder(), home.settings.default_deadline)
        audit, health = AuditLog(store.access), Health()
        store.compact()
        listener.connections = connections_of(home, audit)
        app = make_gateway(
            _make_services(
                _ServerParts(
                    home, store, superlink, presence, manager, recipe_check, audit, health, listener.connections
                )
            )
        )
        config = config_of(app, home, audit, listener.connections)
        assert config.ssl is not None
        maintenance = ServerMaintenance(superlink, manager, Certificates(home, config.ssl, log), audit, health, log)
        with kept_going(maintenance):
            log(f"up at {home.settings.get_public_url()}")
            for sentence in describe_authority_expiry(home):
                log(sentence)
            uvicorn.Server(config).run([listener])
    log("stopped")


@contextmanager
def _superlink(home: ServerHome) -> Iterator[SuperLink]:
    superlink = SuperLink(home.flower_home)
    try:
        superlink.start()
        yield superlink
    finally:
        superlink.close()


def _make_services(parts: _ServerParts) -> GatewayServices:
    authenticator, ca = Authenticator(parts.store.access), parts.home.ca_file.read_text()
    access, audit, settings = parts.store.access, parts.audit, parts.home.settings
    uploads = Uploads(partial(_reply_limit, parts.manager, settings.body_limit))
    control = parts.superlink.get_control_client
    return GatewayServices(
        authenticator=authenticator,
        audit=audit,
        proxy=ReverseProxy(authenticator, audit, parts.presence, uploads, parts.superlink.socket, settings.body_limit),
        device_api=DeviceApi(access, authenticator, audit, control, ca),
        operator_api=OperatorApi(
            parts.store, parts.manager, parts.presence, authenticator, audit, control, parts.recipe_check
        ),
        access_api=AccessApi(access, audit, settings.get_public_url(), ca),
        logs=Logs(parts.home.folder),
        ca_certificate=ca,
        is_healthy=parts.health.is_healthy,
        sweep_connections=parts.connections.sweep,
    )


def _reply_limit(manager: RunManager, otherwise: int, flower_run_id: int) -> int:
    """Return the largest reply in bytes of the run with this id on the SuperLink."""
    run = manager.run_of(flower_run_id)
    return (read_reply_limit(paths.get_runs_folder() / run) if run else None) or otherwise
