"""Starts the processes of a SuperLink's runs, like Flower's SuperExec, but through the SuperLink's socket.

Each process gets the token of its run on standard input, because every user of the machine can read arguments.
"""

import os
import subprocess
import time
from pathlib import Path

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.child_processes import environment, make_isolated_command
from fedtune.flower.unix_socket import ADDRESS, VARIABLE, WORKING, reroute

__all__: list[str] = []

_LOOK_SECONDS = 0.5
_TYPES = [TaskType.SERVER_APP, TaskType.SIMULATION]


def main(socket: Path) -> None:
    """Start runs until the SuperLink ends."""
    start_parent_process_monitor(os.getppid())
    interceptors = [RuntimeVersionHttpInterceptor(component_name="fedtune")]
    client = RuntimeHttpClient(f"http://{ADDRESS}", interceptors=interceptors)
    reroute(client, socket)
    started: list[subprocess.Popen[bytes]] = []
    while True:
        try:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=_TYPES))
        except httpx.HTTPError:  # the SuperLink is starting or ending
            found = None
        if found is not None and found.HasField("task") and found.token:
            started.append(_start(found.task.type, found.token))
        started = [process for process in started if process.poll() is None]  # poll() removes zombies
        time.sleep(_LOOK_SECONDS)


def _start(kind: str, token: str) -> subprocess.Popen[bytes]:
    command, working = make_isolated_command("fedtune.flower.app_child", kind), os.environ.get(WORKING)
    process = subprocess.Popen(command, env=environment(), cwd=working, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(token.encode())
    process.stdin.close()
    return process


if __name__ == "__main__":
    main(Path(os.environ[VARIABLE]))
