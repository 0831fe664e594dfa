"""Run Flower's SuperLink on a Unix socket, without a port. It ends with its parent process, even after kill -9.

The command is ``python -P -m fedtune.flower.superlink_child SOCKET DATABASE [--simulation FOLDER]``. The parent holds
the other end of its standard input.
"""

import argparse
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import uvicorn
from flwr.common.constant import ISOLATION_MODE_SUBPROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app

from fedtune.child_processes import environment, make_isolated_command
from fedtune.flower.unix_socket import ADDRESS, VARIABLE, WORKING

__all__: list[str] = []

_PATIENCE = 5.0
_KEEP_ALIVE_SECONDS = 5


class _Lifespan(SuperLinkLifespan):
    """Flower's lifespan with fedtune's SuperExec. Flower's own needs an address and passes tokens as arguments."""

    def _start_superexec_if_needed(self) -> None:
        self.superexec_process = subprocess.Popen(
            make_isolated_command("fedtune.flower.superexec_child"), env=environment()
        )


def _config(database: str, simulation: bool) -> SuperLinkLifespanConfig:
    """Return a configuration with signed device calls, and without installs, an address or a certificate."""
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=ADDRESS,
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=not simulation,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=simulation,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=database,
        isolation=ISOLATION_MODE_SUBPROCESS,
        runtime_dependency_install=False,
    )


def _listening(path: Path) -> socket.socket:
    """Return a listening socket that only its owner can connect to, from its creation on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


def _end_with_parent() -> None:
    """Exit when the parent process ends. It holds the other end of standard input and never writes."""
    os.read(0, 1)  # sys.stdin would hold its lock while the interpreter exits
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("database")
    parser.add_argument("--simulation", metavar="FOLDER")
    given = parser.parse_args()
    os.environ[VARIABLE] = str(given.socket)
    if given.simulation is not None:
        os.environ[WORKING] = given.simulation
    app = create_app(_config(given.database, given.simulation is not None), _Lifespan)
    config = uvicorn.Config(
        app,
        log_config=get_uvicorn_log_config(console_handler.level),
        access_log=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    uvicorn.Server(config).run([_listening(given.socket)])


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
