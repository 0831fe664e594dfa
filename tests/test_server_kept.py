"""A real server in a home with an awkward name: watched from outside, read from afar, and there for good."""

import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.device.device_home import DeviceHome
from fedtune.errors import ServerError
from tests.federations import trivial
from tests.servers import FEDTUNE, Device, Server, ended, joined, serving
from tests.test_deployment import TWO, command, statuses, submit

pytestmark = pytest.mark.slow

ODD = "a %41 home?timeout=1#b"
"""What a URL, an interpolation or a shell would read otherwise than as it is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kept") / ODD
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    home = folder / "server %(here)s"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDTUNE_HOME", str(home))
        patched.delenv("FEDTUNE_STORE", raising=False)
        patched.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
        with serving(home) as served:
            yield served


def test_health_is_told_to_whoever_asks_and_nothing_else(server: Server) -> None:
    answer = server.knock("GET", "/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_a_token_for_a_name_that_no_device_can_have_is_refused(server: Server) -> None:
    with server.operator() as connection:
        for name in ("Kitchen", "a b", "-a", "x" * 65, "é", "a/b", "\x1b[2J"):
            with pytest.raises(ServerError, match="is not a valid device name; use at most 64 small letters"):
                connection.request_json("POST", "tokens", {"name": name})
        assert connection.request_json("POST", "tokens", {"name": ""})["token"]


def test_the_log_needs_an_operators_key_and_a_sensible_count(server: Server) -> None:
    assert server.knock("GET", "/fedtune/logs").status_code == 401
    assert server.knock("GET", "/fedtune/runs/latest/logs").status_code == 401
    with server.operator() as connection:
        for count in ("0", "-1", "5001", "x", "1e3", "9" * 4000):
            with pytest.raises(ServerError, match="lines must be a whole number from 1 to 5000"):
                connection.request_json("GET", f"logs?lines={count}")
        with pytest.raises(ServerError, match="no run"):
            connection.request_json("GET", "runs/nothing/logs")


@pytest.mark.deployed
def test_a_server_at_rest_logs_less_than_a_megabyte_a_day_also_while_a_run_waits(server: Server) -> None:
    with server.operator() as connection:
        run = submit(server, trivial(TWO))
        time.sleep(1.0)
        before = _logged(server)
        time.sleep(5.0)
        assert (_logged(server) - before) * 86_400 / 5.0 < 1_000_000
        connection.request_json("POST", f"runs/{run}/stop")


@pytest.mark.deployed
def test_a_run_in_such_homes_ends_well_and_both_outlive_their_terminals(server: Server, folder: Path) -> None:
    with joined(server, folder, "partition:0", "partition:1") as devices:
        _until_online(devices)
        for process in (server.process, *(device.process for device in devices)):
            process.send_signal(signal.SIGHUP)
        found = ended(server, submit(server, trivial(TWO)))
        assert server.process.poll() is None
        assert [device.process.poll() for device in devices] == [None, None]
        assert DeviceHome(devices[0].home / "device").is_joined
    assert found["status"] == "completed", found["reason"]
    assert statuses(found) == {"merged"}
    assert {path.name for path in server.place.flower_home.iterdir()} >= {"superlink.sqlite"}
    assert sorted(path.name for path in folder.iterdir()) == ["device-0", "device-1", "server %(here)s"]
    log = command("server", "logs", found["id"])
    assert "rounds 1 to 2" in log
    assert "round 2  2/2 clients" in log
    assert f"server: up at {server.url}" in command("server", "logs")


def test_a_token_typed_in_a_terminal_is_asked_for_and_not_shown(server: Server, folder: Path) -> None:
    token, home = server.token("typed"), folder / "typed"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*FEDTUNE, "device", "enrol", "--token", "-"],
        env={**os.environ, "FEDTUNE_HOME": str(home)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = _until(ours, b"token")
    os.write(ours, f"{token}\n".encode())
    shown += _until(ours, b"try next")
    os.close(ours)
    assert process.wait(30) == 0
    assert b"enrolled as typed" in shown
    assert token.encode() not in shown


def _logged(server: Server) -> int:
    return sum(path.stat().st_size for path in server.place.folder.rglob("*.log*"))


def _until_online(devices: list[Device]) -> None:
    end = time.monotonic() + 60
    while not all("online" in device.log for device in devices):
        assert time.monotonic() < end, [device.log for device in devices]
        time.sleep(0.1)


def _until(terminal: int, words: bytes) -> bytes:
    """What a terminal shows until some words are there."""
    shown, end = b"", time.monotonic() + 60
    while words not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(terminal, 4096)
    return shown
