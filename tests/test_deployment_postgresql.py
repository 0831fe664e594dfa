"""A server whose store is a real PostgreSQL, which goes away in the middle of a run and comes back."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import geteuid
from pathlib import Path

import pytest

from fedtune.flower.child_processes import find_free_port
from fedtune.server.operator_files import write_operator_file
from fedtune.server.server_home import create_server_home
from fedtune.tracking import Store
from tests.federations import execute, trivial
from tests.servers import ended, joined, serving
from tests.test_deployment import LONG, TWO, at_round, hashes, submit
from tests.test_store_postgresql import SERVER_USER, programs, run

pytestmark = [pytest.mark.slow, pytest.mark.deployed]


@dataclass
class Database:
    """A scratch PostgreSQL server on a socket in a folder of its own."""

    folder: Path
    programs: Path

    @property
    def url(self) -> str:
        return f"postgresql://{SERVER_USER}@/postgres?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._control("-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """At once, as if it had crashed: every connection is cut."""
        self._control("-m", "immediate", "stop")

    def _control(self, *arguments: str) -> None:
        run(self.programs / "pg_ctl", "-D", f"{self.folder}/data", "-w", *arguments)


@contextmanager
def postgresql() -> Iterator[Database]:
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'fedtune[postgresql]'")
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed")
    with tempfile.TemporaryDirectory() as name:
        if geteuid() == 0:
            shutil.chown(name, SERVER_USER)
        run(found / "initdb", "--auth=trust", "--no-sync", "-U", SERVER_USER, "-D", f"{name}/data")
        database = Database(Path(name), found)
        database.start()
        try:
            yield database
        finally:
            database.stop()


@pytest.fixture
def database(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The store that the server's own file names."""
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    with postgresql() as made:
        place = create_server_home(["localhost"], f"127.0.0.1:{find_free_port()}")
        with (home / "server" / "server.yaml").open("a") as file:
            file.write(f"store: {made.url}\n")
        with Store.open(made.url) as store:
            write_operator_file(place, store.access, "local", place.operator_file)
        yield made


@pytest.mark.parametrize("seconds", [1.0, 20.0])
def test_a_run_goes_on_when_its_database_was_away(
    database: Database, home: Path, tmp_path: Path, seconds: float
) -> None:
    recipe = trivial(TWO, LONG)
    undisturbed = execute(recipe, run="simulated").hashes
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        number = submit(server, recipe)
        at_round(server, number, 1)
        database.stop()
        time.sleep(seconds)
        database.start()
        found = ended(server, number, 240)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == undisturbed
