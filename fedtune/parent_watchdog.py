"""Ends a run's process when its server ends. Flower's own process would wait for its SuperLink forever."""

import os
import threading
import time

import psutil

__all__ = ["exit_when_parent_dies", "make_parent_environment"]

_VARIABLE = "FEDTUNE_KEEPER"
_LOOK_SECONDS = 0.5


def make_parent_environment() -> dict[str, str]:
    """Return an environment that identifies this process to its descendants, even if its process id is reused."""
    own = psutil.Process()
    return {_VARIABLE: f"{own.pid} {own.create_time()}"}


def exit_when_parent_dies() -> None:
    """Exit this process when the parent named in the environment is gone. Do nothing if none is named."""
    if _VARIABLE in os.environ:
        pid, created = os.environ[_VARIABLE].split()
        threading.Thread(target=_watch, args=(int(pid), float(created)), daemon=True).start()


def _watch(pid: int, created: float) -> None:
    while _there(pid, created):
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _there(pid: int, created: float) -> bool:
    try:
        found = psutil.Process(pid)
        return found.create_time() == created and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
