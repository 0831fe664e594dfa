"""Where attacks take place: a server that is up, an honest device that is served meanwhile, and a hostile one."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from cryptography.hazmat.primitives import serialization

from tests.servers import Knocker, Server, serving, until_up

__all__ = ["Attack", "Honest", "Scene", "scene"]

_START_SECONDS = 240.0
"""On a machine that is busy with something else; otherwise a server is up within ten."""


class Honest:
    """A device that beats and asks for work in a process of its own, and how long it was kept waiting at most."""

    def __init__(self, server: Server, folder: Path) -> None:
        knocker = Knocker(server)
        node = knocker.enroll(server.token("honest")).json()["node_id"]
        ca, key = folder / "honest-ca.pem", folder / "honest-key.pem"
        ca.write_text(server.place.ca_file.read_text())
        private = serialization.PrivateFormat.PKCS8
        key.write_bytes(
            knocker.private.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
        )
        command = [sys.executable, "-m", "tests.attacks.honest", server.url, str(ca), str(key), node]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._longest, self._failures = 0.0, list[str]()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        assert self._first.wait(60), "the honest device is not served at all"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            seconds, failure = json.loads(line)
            self._longest = max(self._longest, seconds)
            self._failures += [failure] if failure else []
            self._first.set()

    def look(self) -> tuple[float, list[str]]:
        """The longest wait and the failures since the last look."""
        found = self._longest, self._failures
        self._longest, self._failures = 0.0, []
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._thread.join(10)


@dataclass
class Scene:
    """What an attack has to do with."""

    server: Server
    honest: Honest
    hostile: Knocker
    folder: Path
    node: int
    left_open: list[Callable[[], None]] = field(default_factory=list)

    def memory(self) -> int:
        """Resident bytes of the processes that deal with whoever knocks: the server's own and the SuperLink's."""
        total = 0
        own = psutil.Process(self.server.process.pid)
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                total += process.memory_info().rss if "server up" in words or "superlink_child" in words else 0
        return total

    def refused(self, answer: httpx.Response, *statuses: int) -> str:
        """The sentence of a refusal; AssertionError for anything else."""
        assert answer.status_code in statuses, f"HTTP {answer.status_code}: {answer.text[:200]}"
        return f"{answer.status_code} {answer.json()['error']}"

    def audit_mentions(self, pattern: str) -> bool:
        """Whether the audit tells of a refusal, within some seconds."""
        end = time.monotonic() + 15
        while time.monotonic() < end:
            lines = [f"{line.actor} {line.message}" for line in self.server.audit() if line.outcome == "refused"]
            if any(re.search(pattern, line) for line in lines):
                return True
            time.sleep(0.2)
        return False


@dataclass(frozen=True)
class Attack:
    """``run`` attacks and tells how it was refused, or raises AssertionError; ``recorded`` must be in the audit then.

    An empty ``recorded`` stands for what the kernel or the attacker's own side refuses, of which a server never hears.
    """

    name: str
    run: Callable[[Scene], str]
    recorded: str
    skip: Callable[[], str] = lambda: ""


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """A server in a folder, with an honest and a hostile device enrolled."""
    os.environ["FEDTUNE_HOME"] = str(folder / "home")
    for name in ("FEDTUNE_STORE", "FEDTUNE_OPERATOR_FILE"):
        os.environ.pop(name, None)
    (folder / "home").mkdir()
    with serving(folder / "home", wait=False) as server:
        until_up(server, _START_SECONDS)
        honest, hostile = Honest(server, folder), Knocker(server)
        node = int(hostile.enroll(server.token("hostile")).json()["node_id"])
        made = Scene(server, honest, hostile, folder, node)
        try:
            yield made
        finally:
            for close in made.left_open:
                close()
            honest.close()
