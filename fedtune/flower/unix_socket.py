"""The SuperLink's only door: a Unix socket in a folder that nobody but its owner may enter.

Flower's SuperLink starts runs for whoever can speak to it, and asks nobody for a key. On a loopback port every user of
the machine could, so it has no port. Flower's own clients know addresses only; here they are led to the socket, by the
two private details of Flower that this takes (flwr 1.41 and 1.42).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.protobuf.client import ProtobufClient

__all__ = ["ADDRESS", "VARIABLE", "WORKING", "private_folder", "reroute", "reroute_all"]

ADDRESS = "superlink"
"""What stands for host and port where Flower wants some; nobody resolves it."""
VARIABLE, WORKING = "FEDTUNE_SUPERLINK_SOCKET", "FEDTUNE_WORKING_FOLDER"
"""Name the socket to the processes that work for a SuperLink, and the folder by which a simulation's paths go."""
_LONGEST_PATH = 100
"""Bytes of a socket's path; the kernel takes 104 or 108."""
_SECONDS = 30.0


def private_folder(wanted: Path) -> Path:
    """A folder for a socket that only its owner may enter: the wanted one, or a temporary one if that path is long."""
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted.chmod(0o700)
    if len(os.fsencode(wanted / "superlink.sock")) <= _LONGEST_PATH:
        return wanted
    return Path(tempfile.mkdtemp(prefix="fedtune-", dir="/tmp"))  # made with mode 0700


def reroute(client: ProtobufClient, socket: Path) -> None:
    """Let one of Flower's clients call through a socket; proxies of the environment have no say in it."""
    client._client.close()
    transport = httpx.HTTPTransport(uds=str(socket))
    client._client = httpx.Client(transport=transport, timeout=_SECONDS, follow_redirects=False)


def reroute_all(socket: Path) -> None:
    """Let every client that Flower makes in this process from now on call through a socket."""
    made = ProtobufClient.__init__

    def make(self: ProtobufClient, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        reroute(self, socket)

    ProtobufClient.__init__ = make  # type: ignore[method-assign]
