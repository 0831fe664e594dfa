"""Flower's stock SuperLink, run so that it ends when the process that started it does, even by kill -9."""

import os
import signal
import threading
import time

from flwr.superlink.cli import flower_superlink

__all__: list[str] = []

_PATIENCE = 5.0


def _end_with_parent() -> None:
    """The parent holds the other end of standard input, and never writes."""
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    flower_superlink()
