"""Flower's SuperLink as a child on a loopback port: TLS and device keys always on, started again when it dies."""

import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from fedtune.errors import ServerError
from server.control import Control
from server.flower_process import end_group, environment, free_port, path
from server.home import ServerHome
from server.lifeline import lifeline
from server.logs import Log, pumped

__all__ = ["SuperLink"]

_START_SECONDS = 90.0
_END_SECONDS = 2.0
"""Flower would wait half a minute for its own clients to hang up; what is lost to a kill is nothing."""
_HOST = "127.0.0.1"
_QUIET = {"FLWR_LOG_LEVEL": "WARNING", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
"""Unless the server's environment says otherwise. Flower tells of every call, several lines a second while a run goes
on, and looks once a second for a run to begin."""
_DATABASE = "sqlite:///superlink.sqlite"
"""In the folder it is started in: Flower puts a path into a URL as it is, where ``%``, ``?`` and ``#`` mean more."""


class SuperLink:
    """One SuperLink at a time, on the same database; ``generation`` counts how often it was started."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()
        self._control: Control | None = None
        self._log = Log(self.log)
        self._pump: threading.Thread | None = None
        self.port = 0
        self.generation = 0

    @property
    def address(self) -> str:
        """Where it listens: host and port."""
        return f"{_HOST}:{self.port}"

    def control(self) -> Control:
        """A connection to it; ServerError while it is down."""
        if self._control is None:
            raise ServerError("Flower's SuperLink is starting; try again shortly")
        return self._control

    def start(self) -> None:
        """Start it and wait until it answers; ServerError when it does not."""
        if shutil.which("flower-superexec", path=path()) is None:
            raise ServerError("Flower's commands are not installed beside this Python; pip install fedtune again")
        self.port = free_port()
        self._home.flower.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server.superlink_child", *self._options()],
            env=_QUIET | environment(self._home.flower) | lifeline(),
            cwd=self._home.flower,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._pump = pumped(self._process, self._log)
        self._wait(self._process)
        self._control = Control(self.address, self._home.ca.read_bytes())
        self.generation += 1

    def _options(self) -> list[str]:
        return [
            *("--host", _HOST, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self._home.ca), "--ssl-certfile", str(self._home.certificate)),
            *("--ssl-keyfile", str(self._home.key), "--enable-supernode-auth"),
            *("--database", _DATABASE, "--disable-runtime-dependency-installation"),
        ]

    @property
    def log(self) -> Path:
        """What it and its children print, of every start."""
        return self._home.flower / "superlink.log"

    def alive(self) -> bool:
        """Whether the process is there; remembers its children, to end them if it is killed."""
        if self._process is None or self._process.poll() is not None:
            return False
        with suppress(psutil.Error):
            self._family |= set(psutil.Process(self._process.pid).children(recursive=True))
        return True

    def executes(self) -> bool:
        """Whether its one child is there, which starts runs' processes; Flower does not start it again."""
        with suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children() if self._process else []
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        return False

    def end(self) -> None:
        """End it and every process it started, some of which lead groups of their own."""
        if self._process is None:
            return
        self.alive()
        self._control = None
        end_group(self._process, _END_SECONDS)
        if self._process.stdin:
            self._process.stdin.close()
        for process in self._family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self._family, timeout=5)
        self._family.clear()
        if self._pump is not None:
            self._pump.join(_END_SECONDS)  # its last words are what tells why it ended
        self._log.close()
        self._process = None

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"https://{self.address}/health", verify=str(self._home.ca), timeout=2.0).is_success:
                    return
            time.sleep(0.1)
        self.end()
        last = self._log.tail(1) or ["it printed nothing"]
        raise ServerError(f"Flower's SuperLink did not start: {last[0]}; see {self.log}")
