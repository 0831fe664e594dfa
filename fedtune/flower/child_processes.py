"""Flower's processes as child processes: their environment, their ports and how they are stopped."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fedtune import child_processes

__all__ = ["find_free_port", "make_child_environment", "stop_process_group"]


def make_child_environment(flower_home: Path) -> dict[str, str]:
    """Return an environment without telemetry, update checks and installs. PATH starts at the interpreter."""
    return {
        **child_processes.environment(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def find_free_port() -> int:
    """Return a port of the loopback address that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def stop_process_group(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a child process and its process group, which it leads."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
