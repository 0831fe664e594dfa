"""A run's process ends with the server that looks after it: Flower's own would wait for its SuperLink for ever."""

import os
import threading
import time

import psutil

__all__ = ["exit_when_parent_dies", "make_parent_environment"]

_VARIABLE = "FEDTUNE_KEEPER"
_LOOK_SECONDS = 0.5


def make_parent_environment() -> dict[str, str]:
    """Environment by which processes below this one know it, also after its number went to another process."""
    own = psutil.Process()
    return {_VARIABLE: f"{own.pid} {own.create_time()}"}


def exit_when_parent_dies() -> None:
    """End this process as soon as the one whose lifeline it holds is gone, if it holds one."""
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
