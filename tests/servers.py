"""Real servers on the loopback address, in processes of their own, and devices' keys to knock with."""

import json
import os
import ssl
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.cli.operator_client import OperatorClient, connect_to_server
from fedtune.flower.child_processes import find_free_port
from fedtune.logs import Logs
from fedtune.server.operator_files import write_operator_file
from fedtune.server.server_home import ServerHome, create_server_home
from fedtune.tracking import AuditRecord, Store

__all__ = ["FEDTUNE", "Device", "Knocker", "Server", "ended", "joined", "serving", "until_up"]

FEDTUNE = (sys.executable, "-m", "fedtune.cli.main")


@dataclass
class Server:
    """A server that is up, as seen from its own machine."""

    place: ServerHome
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return self.place.settings.get_public_url()

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.place.ca_file.read_text())

    def operator(self) -> OperatorClient:
        return connect_to_server(self.place.operator_file)

    def knock(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A request without any key."""
        return httpx.request(method, f"{self.url}{path}", verify=self.trust, timeout=30, **more)

    def token(self, name: str = "") -> str:
        with self.operator() as connection:
            text: str = connection.request_json("POST", "tokens", {"name": name})["token"]
        return text

    def audit(self) -> list[AuditRecord]:
        with Store.open() as store:
            return store.access.audit.list_lines()

    def refused(self, words: str) -> bool:
        """Whether the audit tells, within a moment, of a refusal with these words."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            if any(line.outcome == "refused" and words in line.message for line in self.audit()):
                return True
            time.sleep(0.1)
        return False


@contextmanager
def serving(home: Path, *, wait: bool = True, program: Sequence[str] = FEDTUNE) -> Iterator[Server]:
    """``fedtune server up`` in the given FEDTUNE_HOME, made first where there is none."""
    place = _place(home)
    with _process(program, home) as (process, log):
        server = Server(place, process, log)
        if wait:
            until_up(server)
        yield server


def _place(home: Path) -> ServerHome:
    from fedtune.server.server_home import open_server_home

    if (home / "server" / "server.yaml").exists():
        return open_server_home()
    place = create_server_home(["localhost"], f"127.0.0.1:{find_free_port()}")
    with Store.open() as store:
        write_operator_file(place, store.access, "local", place.operator_file)
    return place


@contextmanager
def _process(program: Sequence[str], home: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    log = home / "up.log"
    with log.open("ab") as out:
        command = [*program, "server", "up"]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process, log
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def until_up(server: Server, seconds: float = 60.0) -> None:
    """Wait until the door answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        with suppress(httpx.HTTPError):
            server.knock("GET", "/fedtune/time")
            return
        time.sleep(0.1)
    raise AssertionError(f"the server is not up: {server.log.read_text()[-2000:]}")


class Knocker:
    """A device's key and what may be done with it, without a device."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.private = ec.generate_private_key(ec.SECP384R1())

    @property
    def openssh(self) -> str:
        public = self.private.public_key()
        return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()

    @property
    def pem(self) -> bytes:
        public = self.private.public_key()
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def enroll(self, token: str, name: str = "knocker") -> httpx.Response:
        told = json.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        sent = {"secret": told["secret"], "name": name, "public_key": self.openssh}
        return self.server.knock("POST", "/fedtune/enroll", json=sent)

    def fleet(self) -> FleetHttpClient:
        signing = NodeAuthHttpInterceptor(self.private, self.private.public_key())
        return FleetHttpClient(self.server.url, interceptors=[signing], verify=self.server.trust)

    def signed(self, path: str, **more: Any) -> httpx.Response:
        """A request with the headers a device signs."""
        client = httpx.Client(verify=self.server.trust, timeout=30)
        request = client.build_request("POST", f"{self.server.url}{path}", **more)
        signing = NodeAuthHttpInterceptor(self.private, self.private.public_key())

        class Context:
            def __init__(self) -> None:
                self.request = request

        with client:
            return signing.intercept(Context(), lambda context: client.send(context.request))  # type: ignore[arg-type]


@dataclass
class Device:
    """A device that joins: its home, its process, what it said."""

    name: str
    home: Path
    source: str
    process: subprocess.Popen[bytes]
    memory: int | None = None
    more: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.home / "said").read_text()

    def again(self) -> None:
        """Join once more, after the process was ended."""
        self.process = _join(self.home, self.source, self.memory, self.more)


@contextmanager
def joined(server: Server, folder: Path, *sources: str, **more: str) -> Iterator[list[Device]]:
    """Enrolled devices device-0, device-1, ... of the given data, each in a process of its own; ``more`` goes into
    their environment.
    """
    devices: list[Device] = []
    try:
        for number, source in enumerate(sources):
            name = f"device-{number}"
            home = folder / name
            home.mkdir(parents=True)
            token = f"{server.token(name)}\n".encode()
            run = [*FEDTUNE, "device", "enrol", "--token", "-"]
            subprocess.run(run, input=token, env=_environment(home, more), check=True, capture_output=True)
            devices.append(Device(name, home, source, _join(home, source, None, more), more=more))
        yield devices
    finally:
        for device in devices:
            device.process.terminate()
        for device in devices:
            with suppress(subprocess.TimeoutExpired):
                device.process.wait(10)
            device.process.kill()
            device.process.wait()


def _join(home: Path, source: str, memory: int | None, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (home / "said").open("ab") as said:
        limit = [] if memory is None else ["--memory", str(memory)]
        command = [*FEDTUNE, "device", "join", "--data", source, *limit]
        return subprocess.Popen(command, env=_environment(home, more), stdout=said, stderr=said)


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "FEDTUNE_HOME": str(home), **more}


def ended(server: Server, run: str, seconds: float = 120.0) -> dict[str, Any]:
    """A run's document once it has ended."""
    end = time.monotonic() + seconds
    while True:
        with server.operator() as connection:
            found: dict[str, Any] = connection.request_json("GET", f"runs/{run}")
        if found["status"] not in ("queued", "running"):
            return found
        if time.monotonic() > end:
            log = "\n".join(Logs(server.place.folder).server(50))
            raise AssertionError(f"run is {found['status']}: {found['reason']}\n{server.log.read_text()}\n{log}")
        time.sleep(0.25)
