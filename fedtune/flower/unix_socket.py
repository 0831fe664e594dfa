"""The SuperLink listens only on a Unix socket, in a folder that only its owner can open.

Flower's SuperLink starts runs for every process that can connect, without a key. On a loopback port, this would be
every user of the machine, so it has no port. Flower's clients support only addresses. This module redirects them to
the socket, through two private parts of Flower (flwr 1.41 and 1.42).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.protobuf.client import ProtobufClient

__all__ = ["ADDRESS", "VARIABLE", "WORKING", "private_folder", "reroute", "reroute_all"]

ADDRESS = "superlink"
"""A placeholder where Flower needs a host and a port. It is never resolved."""
VARIABLE, WORKING = "FEDTUNE_SUPERLINK_SOCKET", "FEDTUNE_WORKING_FOLDER"
"""Environment variables for the child processes: the socket, and the folder of a simulation's relative paths."""
_LONGEST_PATH = 100
"""The largest path of a socket in bytes. The kernel's limit is 104 or 108."""
_SECONDS = 30.0


def private_folder(wanted: Path) -> Path:
    """Return a folder that only its owner can open: the wanted one, or a temporary one if the path is too long."""
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted.chmod(0o700)
    if len(os.fsencode(wanted / "superlink.sock")) <= _LONGEST_PATH:
        return wanted
    return Path(tempfile.mkdtemp(prefix="fedtune-", dir="/tmp"))  # mkdtemp uses mode 0700


def reroute(client: ProtobufClient, socket: Path) -> None:
    """Connect one of Flower's clients to a socket. Proxies in the environment are ignored."""
    client._client.close()
    transport = httpx.HTTPTransport(uds=str(socket))
    client._client = httpx.Client(transport=transport, timeout=_SECONDS, follow_redirects=False)


def reroute_all(socket: Path) -> None:
    """Connect every client that Flower creates in this process from now on to a socket."""
    made = ProtobufClient.__init__

    def make(self: ProtobufClient, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        reroute(self, socket)

    ProtobufClient.__init__ = make  # type: ignore[method-assign]
