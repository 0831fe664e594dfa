"""Whether a run is being worked on: its owner holds a lock that the system releases even when the owner is killed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedtune import home
from fedtune.errors import StoreError

__all__ = ["alive", "claim"]


@contextmanager
def claim(run_id: str) -> Iterator[None]:
    """Own a run while the block lasts; StoreError when another process does."""
    path = _path(run_id)
    # Not zero: `alive` in another process holds a shared lock for an instant.
    lock = FileLock(path, timeout=0.5, poll_interval=0.01)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StoreError(f"run {run_id} is being executed by another process; wait for it or stop it") from error
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the folder writable") from error
    try:
        yield
    finally:
        lock.release()


def alive(run_id: str) -> bool:
    """Whether some process owns the run now; looking changes nothing on disk and shuts no owner out."""
    try:
        with _path(run_id).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):  # of another user, whose word in the store is all there is
        return True
    return False


def _path(run_id: str) -> Path:
    return home.runs() / run_id / "lock"
