"""Log files with timestamps, rotated at a fixed size.

There are three logs. ``server.log`` is written by the server, ``flower/superlink.log`` holds the output of Flower's
SuperLink and its children, and ``server.log`` in a run's folder holds the output of the process that coordinates the
run.
"""

import io
import logging
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Self

from fedtune import paths
from fedtune.untrusted import clean_text

__all__ = ["Log", "Logs", "copy_output_to_log", "record_output"]

MOST_BYTES, OLDER = 2_000_000, 4
"""The size in bytes at which a log is rotated, and the number of older logs that are kept."""
_LONGEST = 2000
_READ = 8192
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TEXT = logging.Formatter("%(asctime)sZ %(message)s", "%Y-%m-%dT%H:%M:%S")
_TEXT.converter = time.gmtime


class _Quiet(RotatingFileHandler):
    """A handler that ignores its own errors: on a full disk, log lines are lost and the program continues."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        return


class Log:
    """One log file. Several threads may write to it."""

    def __init__(self, path: Path, most: int = MOST_BYTES, older: int = OLDER) -> None:
        self.path = path
        self._handler = _Quiet(path, maxBytes=most, backupCount=older, delay=True, encoding="utf-8", errors="replace")
        self._handler.setFormatter(_TEXT)

    def write(self, text: str) -> None:
        """Write each line of a text. Characters that do not print are escaped, and colour codes are removed."""
        for line in _COLOURS.sub("", text).splitlines():
            if line.strip():
                shown = clean_text(line.rstrip(), _LONGEST)
                self._handler.handle(logging.makeLogRecord({"msg": shown, "levelno": logging.INFO}))

    def close(self) -> None:
        """Close the file. A later write opens it again."""
        with suppress(OSError):
            self._handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tail(self, count: int) -> list[str]:
        """Return the newest lines, oldest first. If the newest file has too few, an older one is read too."""
        found: list[str] = []
        for path in (self.path, self.path.with_name(f"{self.path.name}.1")):
            if len(found) < count and path.exists():
                found = path.read_text(encoding="utf-8", errors="replace").splitlines() + found
        return found[-count:]


@dataclass(frozen=True)
class Logs:
    """The logs of a server whose home is ``folder``."""

    folder: Path

    def server(self, count: int) -> list[str]:
        """Return the newest lines of the server and of Flower, sorted by time."""
        own = [(line, "server") for line in Log(self.folder / "server.log").tail(count)]
        flower = [(line, "flower") for line in Log(self.folder / "flower" / "superlink.log").tail(count)]
        merged = sorted(own + flower, key=lambda one: one[0].partition(" ")[0])  # stable within a second
        return [_marked(line, source) for line, source in merged][-count:]

    def run(self, run: str, count: int) -> list[str]:
        """Return the newest lines of the process that coordinates a run; an empty list before it starts."""
        return Log(_of_run(run)).tail(count)


def _marked(line: str, source: str) -> str:
    moment, _, text = line.partition(" ")
    return f"{moment} {source}: {text}"


def _of_run(run: str) -> Path:
    return paths.get_runs_folder() / run / "server.log"


def copy_output_to_log(process: "subprocess.Popen[bytes]", log: Log) -> threading.Thread:
    """Start a thread that copies the output of a child process to a log, until all that inherit the pipe have ended."""

    def pump() -> None:
        assert process.stdout is not None
        with process.stdout as pipe:
            while piece := pipe.readline(_READ):
                log.write(piece.decode(errors="replace"))

    thread = threading.Thread(target=pump, name=f"log of {process.pid}", daemon=True)
    thread.start()
    return thread


class _Lines(io.TextIOBase):
    """A text stream that forwards its text to another stream, and copies whole lines to a log."""

    def __init__(self, before: io.TextIOBase, log: Log) -> None:
        self._before, self._log, self._begun = before, log, ""

    def write(self, text: str) -> int:
        self._before.write(text)
        lines = (self._begun + text).split("\n")
        self._begun = lines.pop()[-_LONGEST:]
        self._log.write("\n".join(lines))
        return len(text)

    def flush(self) -> None:
        self._before.flush()


@contextmanager
def record_output(run: str) -> Iterator[None]:
    """Copy the output and the exceptions of this process inside the block to the run's log."""
    path = _of_run(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Log(path) as log:
        out, err = _Lines(sys.stdout, log), _Lines(sys.stderr, log)  # type: ignore[arg-type]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        except BaseException:
            log.write(traceback.format_exc())
            raise
