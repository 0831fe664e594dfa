"""Attacks by whoever can reach the port: odd requests, large ones, guesses, and connections that say nothing."""

import os
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from typing import Any

import httpx
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient

from tests.attacks.scene import Attack, Scene
from tests.servers import FEDTUNE, Knocker

__all__ = ["ATTACKS"]

_FLOOD = 300
_HEAD = b"POST /fedtune/enroll HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"


def _control(scene: Scene) -> str:
    with ControlHttpClient(scene.server.url, verify=scene.server.trust) as control:
        try:
            control.StartRun(StartRunRequest())
        except httpx.HTTPStatusError as error:
            return scene.refused(error.response, 404)
    raise AssertionError("a run was started")


def _terminal(scene: Scene) -> str:
    """Markup and terminal codes in a path, and what the operator's terminal gets of it."""
    for path in ("%5B/nope%5D", "%1B%5D0;owned%07", "%C2%9B31m", "%E2%80%AEgpj.exe", "%5Bred%5D" * 40):
        scene.refused(scene.server.knock("GET", f"/fedtune/{path}"), 404)
    shown = subprocess.run([*FEDTUNE, "server", "audit"], capture_output=True, text=True, check=True).stdout
    assert all(character.isprintable() or character == "\n" for character in shown), ascii(shown)
    assert "[/nope]" in "".join(shown.split())
    return "shown as text, nothing acted on"


def _json(scene: Scene) -> str:
    bodies = (
        b"[" * 3000,
        b"[" * 900 + b"]" * 900,
        b'{"a":' * 100_000,
        b"1" * 400,
        b"NaN",
        b"1e999",
        b"\xff",
        b'"\\ud800"',
    )
    told = [scene.refused(scene.server.knock("POST", "/fedtune/enroll", content=body), 400) for body in bodies]
    return told[0]


def _large(scene: Scene) -> str:
    """20 MB where a kilobyte is expected, declared and not, and what is sent of one that was refused."""
    with suppress(httpx.HTTPError):
        scene.refused(scene.server.knock("POST", "/fedtune/enroll", content=b"x" * 20_000_000), 413)
    with suppress(httpx.HTTPError):
        scene.refused(scene.server.knock("POST", "/fedtune/enroll", content=iter([b"x" * 1_000_000] * 20)), 413)
    line = _tls(scene)
    line.sendall(_HEAD.replace(b"1000", b"9" * 15) + b"\r\n")
    assert b" 413 " in line.recv(2000)
    return "413 before it is read"


def _headers(scene: Scene) -> str:
    line = _tls(scene)
    with suppress(OSError):
        for number in range(10_000):
            line.sendall(f"X-{number}: {'x' * 100}\r\n".encode() if number else b"GET / HTTP/1.1\r\n")
    with suppress(OSError):
        told = line.recv(1000)
        assert not told or b" 400 " in told, told
    return "cut off after 64 KiB"


def _plain(scene: Scene) -> str:
    host, port = scene.server.place.settings.address
    with socket.create_connection((host, port), timeout=5) as plain:
        plain.sendall(b"GET /fedtune/ca HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with suppress(OSError):
            assert b"200" not in plain.recv(100)
    return "the TLS connection failed"


def _guesses(scene: Scene) -> str:
    """Guessed operators' keys and guessed tokens."""
    told = ""
    with _from(scene, "127.0.2.2") as client:
        for number in range(_FLOOD):
            guess = {"Authorization": f"Bearer guess-{number}"}
            told = scene.refused(client.get("/fedtune/runs", headers=guess), 401)
        key = Knocker(scene.server).openssh
        for number in range(100):
            sent = {"secret": f"guess-{number}", "name": "x", "public_key": key}
            scene.refused(client.post("/fedtune/enroll", json=sent), 403)
    return told


def _flush(scene: Scene) -> str:
    """Different requests cannot push what was done out of the audit, nor fill it."""
    with _from(scene, "127.0.2.1") as client:
        for number in range(_FLOOD):
            client.get(f"/fedtune/flush-{number}")
    with scene.server.operator() as connection:
        lines: list[dict[str, Any]] = []
        more = True
        while more:
            before = f"&before={lines[-1]['id']}" if lines else ""
            told = connection.request_json("GET", f"audit?limit=1000{before}")
            lines, more = lines + told["audit"], told["more"]
    assert any(line["outcome"] == "done" and "hostile" in line["message"] for line in lines)
    assert len([line for line in lines if "flush-" in line["message"]]) <= 240, "sixty a minute"
    return f"{len(lines)} lines in the audit"


def _from(scene: Scene, source: str) -> httpx.Client:
    """A client of its own address, for which lines of the audit are counted apart."""
    transport = httpx.HTTPTransport(verify=scene.server.trust, local_address=source)
    return httpx.Client(base_url=scene.server.url, transport=transport, timeout=30)


def _tls(scene: Scene, source: str = "127.0.0.1") -> ssl.SSLSocket:
    host, port = scene.server.place.settings.address
    line = scene.server.trust.wrap_socket(
        socket.create_connection((host, port), timeout=10, source_address=(source, 0)), server_hostname="localhost"
    )
    scene.left_open.append(line.close)
    return line


def _unfinished(scene: Scene) -> str:
    """A thousand that never speak TLS and two hundred whose headers never end, from the honest device's own address."""
    opened = 0
    for _ in range(1000):
        line = socket.create_connection(scene.server.place.settings.address, timeout=10)
        scene.left_open.append(line.close)
        opened += 1
    for _ in range(200):
        with suppress(OSError):
            _tls(scene).sendall(_HEAD)
    time.sleep(2)
    limit = scene.server.place.settings.connections
    assert scene.server.process.poll() is None
    return f"{opened + 200} opened, of which the server holds {limit} at most"


def _many_addresses(scene: Scene) -> str:
    """The same from ten addresses at once; then all of them are cut in time."""
    for source, _ in zip(count(2), range(10), strict=False):
        for _ in range(100):
            line = socket.create_connection(
                scene.server.place.settings.address, timeout=10, source_address=(f"127.0.1.{source}", 0)
            )
            scene.left_open.append(line.close)
    time.sleep(18)
    return "cut after 15 s"


def _slow(scene: Scene) -> str:
    """A body that comes a byte a second is cut in half a minute."""
    line = _tls(scene)
    line.sendall(_HEAD + b"\r\n")
    end = time.monotonic() + 45
    while time.monotonic() < end:
        try:
            line.sendall(b" ")
        except OSError:
            return "cut off after 30 s"
        time.sleep(1)
    raise AssertionError("it is still open")


def _not_on_linux() -> str:
    return "" if sys.platform == "linux" and os.cpu_count() else "needs the addresses 127.0.1.x"


ATTACKS = [
    Attack("a stranger calls Flower's Control API", _control, "POST /v1/control/start-run"),
    Attack("markup and terminal codes in paths", _terminal, r"\[/nope\]"),
    Attack("JSON that is deep, endless or not finite", _json, "lists or objects nested more than"),
    Attack("20 MB where a kilobyte belongs", _large, "is larger than the"),
    Attack("headers without end", _headers, "invalid HTTP request, or headers that are too large"),
    Attack("plain HTTP on the TLS port", _plain, r"127\.0\.0\.1 the TLS connection failed"),
    Attack("guessed keys and tokens", _guesses, "an unknown key"),
    Attack("an audit flooded by a stranger", _flush, "flush-"),
    Attack(
        "a thousand connections that say nothing", _unfinished, "too many connections|more requests within a minute"
    ),
    Attack(
        "a thousand more from ten addresses", _many_addresses, r"127\.0\.1\.\d+ sent no complete request", _not_on_linux
    ),
    Attack("a body that comes a byte a second", _slow, "sent its body too slowly"),
]
