"""Flower's SuperLink as a child process on a private Unix socket. Devices must authenticate with their keys."""

import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from fedtune.child_processes import make_isolated_command
from fedtune.errors import ServerError
from fedtune.flower.child_processes import make_child_environment, stop_process_group
from fedtune.flower.control_client import ControlClient
from fedtune.flower.unix_socket import ADDRESS, private_folder
from fedtune.logs import Log, copy_output_to_log
from fedtune.parent_watchdog import make_parent_environment
from fedtune.tracking.compaction import shrink_database, trim_log

__all__ = ["SuperLink"]

_START_SECONDS = 90.0
_END_SECONDS = 2.0
"""Seconds before the SuperLink is killed. It would wait half a minute for its clients; a kill loses nothing."""
_QUIET = {"FLWR_LOG_LEVEL": "WARNING"}
"""Flower's log level, unless the environment of the server sets it. By default Flower logs every call."""
_DATABASE = "sqlite:///superlink.sqlite"
"""Relative to the working folder. Flower does not escape ``%``, ``?`` and ``#`` when it puts a path into a URL."""


class SuperLink:
    """One SuperLink process at a time, on the same database. ``start_count`` counts its starts.

    ``folder`` is Flower's home. With ``simulation``, no devices can connect, and clients run on Flower's simulation
    engine in the working folder, because paths in a recipe are relative to it.
    """

    def __init__(self, folder: Path, *, simulation: bool = False) -> None:
        self._folder, self._simulation = folder, simulation
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()
        self._control: ControlClient | None = None
        self.socket = private_folder(folder) / "superlink.sock"
        self._log = Log(self.log_file)
        self._pump: threading.Thread | None = None
        self.start_count = 0

    def get_control_client(self) -> ControlClient:
        """Return a connection to the SuperLink; raise ServerError while it is down."""
        if self._control is None:
            raise ServerError("Flower's SuperLink is starting; try again shortly")
        return self._control

    def start(self) -> None:
        """Start the SuperLink and wait until it replies; raise ServerError if it does not."""
        options = ["--simulation", os.getcwd()] if self._simulation else []
        self.socket.unlink(missing_ok=True)
        shrink_database(self._folder / "superlink.sqlite")
        self._process = subprocess.Popen(
            make_isolated_command("fedtune.flower.superlink_child", str(self.socket), _DATABASE, *options),
            env=_QUIET | make_child_environment(self._folder) | make_parent_environment(),
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._pump = copy_output_to_log(self._process, self._log)
        self._wait(self._process)
        self._control = ControlClient(self.socket)
        self.start_count += 1

    def trim(self) -> None:
        """Limit the size of the write-ahead log of its database. Must be called regularly."""
        trim_log(self._folder / "superlink.sqlite")

    @property
    def log_file(self) -> Path:
        """The file with the output of the SuperLink and its children, over all starts."""
        return self._folder / "superlink.log"

    def is_alive(self) -> bool:
        """Whether the process is running. Its children are recorded, so that they can be ended if it is killed."""
        if self._process is None or self._process.poll() is not None:
            return False
        with suppress(psutil.Error):
            self._family |= set(psutil.Process(self._process.pid).children(recursive=True))
        return True

    def is_superexec_alive(self) -> bool:
        """Whether its child that starts the processes of runs is running. Flower does not restart this child."""
        with suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children() if self._process else []
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        return False

    def stop(self) -> None:
        """End the SuperLink and every process that it started. Some of these lead process groups of their own."""
        if self._process is None:
            return
        self.is_alive()
        if self._control is not None:
            self._control.close()
        self._control = None
        stop_process_group(self._process, _END_SECONDS)
        if self._process.stdin:
            self._process.stdin.close()
        for process in self._family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self._family, timeout=5)
        self._family.clear()
        if self._pump is not None:
            self._pump.join(_END_SECONDS)  # the last lines of the log explain why it ended
        self._log.close()
        self._process = None

    def close(self) -> None:
        """End the SuperLink, and remove the folder of its socket if it is a temporary one."""
        self.stop()
        if self.socket.parent != self._folder:
            shutil.rmtree(self.socket.parent, ignore_errors=True)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            if self._answers():
                return
            time.sleep(0.1)
        self.stop()
        last = self._log.tail(1) or ["it printed nothing"]
        raise ServerError(f"Flower's SuperLink did not start: {last[0]}; see {self.log_file}")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            if line.connect_ex(str(self.socket)):
                return False
        with (
            suppress(httpx.HTTPError),
            httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=2.0) as client,
        ):
            return client.get(f"http://{ADDRESS}/health").is_success
        return False
