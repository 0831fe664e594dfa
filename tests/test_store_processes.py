"""Real processes, at the same time or killed half-way: nothing is lost, nothing is torn, and no owner is imagined."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.tracking import Store, claim_run, is_run_active
from tests.store_examples import a_round, start

ROOT = Path(__file__).parents[1]
COMMITS = 50


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    return tmp_path


def begin(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start Python code that says "ready" and waits for a line before it goes on."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def go(*processes: "subprocess.Popen[str]") -> None:
    """Let processes that are ready go on together."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def end(*processes: "subprocess.Popen[str]") -> list[int]:
    codes = []
    for process in processes:
        process.communicate(timeout=60)
        codes.append(process.returncode)
    return codes


WRITE = f"""
import sys
from fedtune.tracking import Store
from tests.store_examples import a_round, start
print("ready", flush=True)
sys.stdin.readline()
with Store.open() as store:
    start(store, sys.argv[1])
    for number in range({COMMITS}):
        store.commit_round(sys.argv[1], a_round(number))
"""


def test_two_processes_create_the_store_and_write_at_once_and_lose_nothing() -> None:
    writers = [begin(WRITE, "one"), begin(WRITE, "two")]
    go(*writers)
    assert end(*writers) == [0, 0]
    with Store.open() as store:
        expected = [a_round(number) for number in range(COMMITS)]
        assert store.rounds_of(["one", "two"]) == {"one": expected, "two": expected}


CREATE = """
import sys
from fedtune.tracking import Store
import fedtune.tracking.schema_version
print("ready", flush=True)
sys.stdin.readline()
with Store.open() as store:
    store.runs()
"""


def test_many_processes_can_create_the_store_at_once(home: Path) -> None:
    for attempt in range(2):
        creators = [begin(CREATE) for _ in range(3)]
        go(*creators)
        assert end(*creators) == [0] * 3
        (home / "store.sqlite").rename(home / f"old-{attempt}.sqlite")


DIE_INSIDE = """
import os, signal, sys
from sqlalchemy import Engine, event
from fedtune.tracking import Store
from tests.store_examples import a_round
def die(connection, cursor, statement, *rest):
    if statement.startswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(Engine, sys.argv[2], die)
with Store.open() as store:
    store.commit_round("film-1a2b", a_round(1))
"""


@pytest.mark.parametrize("moment", ["before_cursor_execute", "after_cursor_execute"])
@pytest.mark.parametrize("table", ["rounds", "client_records", "metrics", "checkpoints"])
def test_a_process_killed_inside_a_commit_leaves_nothing_of_the_round(table: str, moment: str) -> None:
    with Store.open() as store:
        start(store)
        store.commit_round("film-1a2b", a_round(0))
        assert end(begin(DIE_INSIDE, f"INSERT INTO {table}", moment)) == [-signal.SIGKILL]
        assert store.rounds("film-1a2b") == [a_round(0)]
        store.commit_round("film-1a2b", a_round(1))
    with Store.open() as store:
        assert store.rounds("film-1a2b") == [a_round(0), a_round(1)]


OWN = """
import sys
from fedtune.tracking import claim_run
with claim_run("film-1a2b"):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def owner() -> Iterator["subprocess.Popen[str]"]:
    process = begin(OWN)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_is_owned_by_one_process_at_a_time(owner: "subprocess.Popen[str]") -> None:
    assert is_run_active("film-1a2b")
    refused = pytest.raises(StoreError, match="run film-1a2b is being executed by another process")
    with refused, claim_run("film-1a2b"):
        pass
    with claim_run("another"):
        pass
    owner.communicate("\n", timeout=60)
    assert not is_run_active("film-1a2b")
    with claim_run("film-1a2b"):
        pass


def test_an_owner_that_is_killed_owns_nothing(owner: "subprocess.Popen[str]") -> None:
    with Store.open() as store:
        start(store)
        assert store.run("latest").status == "running"
        owner.kill()
        owner.wait()
        assert store.run("latest").status == "interrupted"


def test_owning_twice_in_one_process_is_refused_and_the_first_owner_stays() -> None:
    with claim_run("a"):
        with pytest.raises(StoreError, match="being executed"), claim_run("a"):
            pass
        assert is_run_active("a")
    assert not is_run_active("a")


def test_a_forked_child_does_not_keep_a_dead_owner_alive() -> None:
    with claim_run("a"):
        read, write = os.pipe()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=read, pass_fds=[read])
        os.close(read)
    assert not is_run_active("a")
    os.close(write)
    assert child.wait(10) == 1


def test_others_who_look_at_the_same_time_are_no_owners(home: Path) -> None:
    with claim_run("a"):
        pass
    with (home / "runs" / "a" / "lock").open("rb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        assert not is_run_active("a")


def test_looking_whether_a_run_is_owned_makes_no_file_and_shuts_nobody_out(home: Path) -> None:
    assert not is_run_active("a")
    assert not (home / "runs").exists()
    with claim_run("a"):
        pass
    looker = begin(
        "from fedtune.tracking import is_run_active\nprint('ready', flush=True)\ninput()\n"
        "while True: is_run_active('a')"
    )
    go(looker)
    for _ in range(50):
        with claim_run("a"):
            assert is_run_active("a")
    looker.kill()
    looker.communicate()
