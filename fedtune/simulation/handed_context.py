"""Hands a run's context to a worker process that is being started, with any number of tensors in shared memory.

A process that starts from the fork server is given at most 250 open files, and each shared tensor takes one. A context
is therefore pickled as for a process that runs already, which fetches the files from this one when it reads the pickle.
"""

from multiprocessing.context import get_spawning_popen, set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from fedtune.training import RunContext

__all__ = ["HandedContext"]


class HandedContext:
    """Becomes the run context itself in the process that unpickles it. Each copy is pickled anew, since the files of a
    pickle can be fetched once.
    """

    def __init__(self, run_context: RunContext) -> None:
        self._run_context = run_context

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        """Pickle the context apart from the process that is being started."""
        started = get_spawning_popen()
        set_spawning_popen(None)
        try:
            return ForkingPickler.loads, (bytes(ForkingPickler.dumps(self._run_context)),)
        finally:
            set_spawning_popen(started)
