"""A PostgreSQL server of this benchmark's own, which can be killed and started again. It needs Debian's postgresql."""

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["Database"]

USER = "postgres"
"""A PostgreSQL server refuses to run as the superuser."""


class Database:
    """A database below ``folder``, flushed to disk as by default; RuntimeError where PostgreSQL is not installed."""

    def __init__(self, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        if not found:
            raise RuntimeError("PostgreSQL is not installed; apt-get install postgresql")
        self._programs, self._folder = found[-1], folder
        folder.mkdir()
        if os.geteuid() == 0:
            shutil.chown(folder, USER)
        self._run("initdb", "--auth=trust", "-U", USER)
        self.start()

    @property
    def url(self) -> str:
        """Where it is, for a store."""
        return f"postgresql://{USER}@/postgres?host={self._folder}"

    def start(self) -> None:
        """Start it, also over what a killed one left."""
        options = f"-k {self._folder} -c listen_addresses="
        self._run("pg_ctl", "-w", "-l", f"{self._folder}/log", "-o", options, "start")

    def kill(self) -> None:
        """kill -9 of the server and of every process it serves with."""
        lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
        own = psutil.Process(int(lines[0]))
        family = [own, *own.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        time.sleep(0.1)

    def close(self) -> None:
        """End it."""
        with suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *words: str) -> None:
        prefix = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
        command = [*prefix, str(self._programs / program), "-D", f"{self._folder}/data", *words]
        subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL)
