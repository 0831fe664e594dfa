"""The process of one run: it runs Flower's ServerApp or simulation, connected to the SuperLink's socket.

The command is ``python -P -m fedtune.flower.app_child KIND``. KIND is one of Flower's task types. The run's token comes
on standard input.
"""

import os
import sys
from pathlib import Path
from queue import Queue

from flwr.supercore.constant import TaskType
from flwr.supercore.logger import mirror_output_to_queue, restore_output

from fedtune.flower.unix_socket import ADDRESS, VARIABLE, reroute_all

__all__: list[str] = []


def main(kind: str, token: str, socket: Path) -> None:
    """Execute the run."""
    reroute_all(socket)
    output: Queue[str | None] = Queue()
    mirror_output_to_queue(output)
    if kind == TaskType.SIMULATION:
        from flwr.simulation.app import run_simulation_process as run

        from fedtune.flower.ray_working_folder import keep_working_folder_out

        keep_working_folder_out()
    else:
        from flwr.superlink.runtime import run_serverapp as run
    run(
        ADDRESS,
        output,
        token,
        insecure=True,
        certificates=None,
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )
    restore_output()


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin.read(), Path(os.environ[VARIABLE]))
