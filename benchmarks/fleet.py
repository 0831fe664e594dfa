"""A real server and real devices on this machine for benchmarks; each can be ended and started again."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.devices_demo import FEDTUNE, free_port, home
from fedtune.cli.operator_client import OperatorClient, connect_to_server
from fedtune.errors import ServerError
from fedtune.recipe.schema import Recipe

__all__ = ["Fleet", "Member", "fleet"]

PATIENCE = 120.0


@dataclass
class Member:
    """A device, or the server: its environment, its command and, while it is up, its process."""

    name: str
    environment: dict[str, str]
    words: tuple[str, ...]
    log: Path
    before: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def home(self) -> Path:
        """Its FEDTUNE_HOME."""
        return Path(self.environment["FEDTUNE_HOME"])

    def start(self) -> None:
        """Start its command; what it says is added to its log."""
        with self.log.open("ab") as out:
            command = [*self.before, *FEDTUNE, *self.words]
            self.process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def end(self, patience: float = 30.0) -> None:
        """End it well, or after so many seconds as it comes."""
        if self.process is None:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        self.process = None

    def up(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    def below(self) -> list[psutil.Process]:
        """Its process and all below it."""
        if not self.up() or self.process is None:
            return []
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


@dataclass
class Fleet:
    """A server that is up and devices that have joined it."""

    server: Member
    devices: list[Member] = field(default_factory=list)

    def operator(self) -> OperatorClient:
        """A connection with the key of the server's own operator."""
        return connect_to_server(self.server.home / "server" / "operator.json")

    def submit(self, recipe: Recipe) -> str:
        """Queue a run; its id."""
        with self.operator() as connection:
            run: str = connection.request_json("POST", "runs", {"recipe": recipe.model_dump(mode="json")})["run"]
        return run

    def found(self, run: str) -> dict[str, Any]:
        """A run's document, as soon as the server answers."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with self.operator() as connection:
                    document: dict[str, Any] = connection.request_json("GET", f"runs/{run}")
                return document
            except ServerError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def ended(self, run: str, seconds: float) -> dict[str, Any]:
        """A run's document once it has ended, or as it stands after so many seconds."""
        end = time.monotonic() + seconds
        while (found := self.found(run))["status"] in ("queued", "running") and time.monotonic() < end:
            time.sleep(0.5)
        return found

    def enrol(self, number: int, data: str, before: Sequence[str] = (), **more: str) -> Member:
        """A new device of this fleet, not yet started."""
        folder = self.server.home.parent
        environment = home(folder / f"device-{number}") | more
        with self.operator() as connection:
            token: str = connection.request_json("POST", "tokens", {"name": f"device-{number:02d}"})["token"]
        command = [*before, *FEDTUNE, "device", "enrol", "--token", "-"]
        subprocess.run(command, env=environment, check=True, input=token, text=True, stdout=subprocess.DEVNULL)
        words = ("device", "join", "--data", data)
        log = folder / f"device-{number}.log"
        self.devices.append(Member(f"device-{number:02d}", environment, words, log, tuple(before)))
        return self.devices[-1]


@contextmanager
def fleet(
    count: int, *, address: str = "127.0.0.1", store: str = "", folder: Path | None = None, **more: str
) -> Iterator[Fleet]:
    """A server at ``address`` with ``count`` devices on the loopback line, ended when the block ends.

    ``store`` is the URL of the run store when it is not SQLite, ``more`` goes into the environment of all.
    """
    work = folder or Path(tempfile.mkdtemp(prefix="fedtune-fleet-"))
    server = home(work / "server") | more
    listen = f"{address}:{free_port()}"
    subprocess.run(
        [*FEDTUNE, "server", "init", "--hostname", address, "--listen", listen],
        env=server | ({"FEDTUNE_STORE": store} if store else {}),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    if store:
        with (work / "server" / "server" / "server.yaml").open("a") as settings:
            settings.write(f"store: {store}\n")
    made = Fleet(Member("server", server, ("server", "up"), work / "server.log"))
    try:
        made.server.start()
        until_up(made)
        for number in range(count):
            made.enrol(number, f"partition:{number}", **more).start()
        yield made
    finally:
        for device in made.devices:
            if device.process is not None:
                device.process.terminate()
        for member in (*made.devices, made.server):
            member.end()
        if folder is None:
            shutil.rmtree(work, ignore_errors=True)


def until_up(made: Fleet) -> None:
    """Wait until the door answers operators; SystemExit when it does not."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(ServerError), made.operator() as connection:
            connection.request_json("GET", "devices")
            return
        time.sleep(0.1)
    raise SystemExit(f"the server did not come up; see {made.server.log}")
