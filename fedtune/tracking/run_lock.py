"""The lock of a run that is being executed. The system releases it even when its owner is killed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedtune import paths
from fedtune.errors import StoreError

__all__ = ["claim_run", "hold_file_lock", "is_run_active"]

_CLAIM_TIMEOUT = 0.5  # seconds; not zero, because is_run_active in another process holds the lock for an instant


@contextmanager
def hold_file_lock(path: Path, timeout: float, refusal: str) -> Iterator[None]:
    """Hold a lock file while the block lasts; StoreError when another process keeps it beyond ``timeout`` seconds."""
    lock = FileLock(path, timeout=timeout, poll_interval=0.01)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StoreError(refusal) from error
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the folder writable") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claim_run(run_id: str) -> Iterator[None]:
    """Own a run while the block lasts; StoreError when another process does."""
    refusal = f"run {run_id} is being executed by another process; wait for it or stop it"
    with hold_file_lock(_path(run_id), _CLAIM_TIMEOUT, refusal):
        yield


def is_run_active(run_id: str) -> bool:
    """Return whether a process executes the run now. Nothing changes on disk, and no owner is blocked."""
    try:
        with _path(run_id).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):  # the lock of another user; only the store says whether the run goes on
        return True
    return False


def _path(run_id: str) -> Path:
    return paths.get_runs_folder() / run_id / "lock"
