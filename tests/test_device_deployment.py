"""Real devices of a real server, whose processes, lines, clocks and disks fail them: the run ends in the same bits."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedtune.device.device_home import DeviceHome
from fedtune.device.enrolment import EnrolmentToken, enrol_device
from fedtune.errors import DeviceError
from tests.federations import execute, trivial
from tests.links import linked
from tests.servers import Device, Server, ended, joined, serving
from tests.test_deployment import LONG, TWO, at_round, hashes, statuses, submit

pytestmark = pytest.mark.deployed

STOCK_SUPERNODE = 170_000_000
"""Resident bytes of Flower's own idle node; its executor holds 123 MB more beside it."""
SKEWED = """
import datetime, sys, time
real, behind = time.time, 30 * 86_400
time.time = lambda: real() - behind
if "fedtune.device.trainer" not in sys.orig_argv:  # libraries that pickle or subclass a datetime want the real class
    class Behind(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(seconds=behind)
    datetime.datetime = Behind
"""


DIES_WITH_AN_ORDER_IN_HAND = """
import os, signal
from fedtune.device.device_home import DeviceHome
from fedtune.cli.main import main
assert hasattr(DeviceHome, 'save_pending')
DeviceHome.save_pending = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    with serving(home) as served:
        yield served


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDTUNE_HOME", str(tmp_path_factory.mktemp("simulated")))
        patched.delenv("FEDTUNE_STORE", raising=False)
        return execute(trivial(TWO, LONG), run="simulated").hashes


def until(meets: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not meets():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.002)


def state(device: Device) -> str:
    return str(DeviceHome(device.home / "device").read_status().get("state", ""))


def trainers(device: Device) -> list[psutil.Process]:
    return psutil.Process(device.process.pid).children()


def test_an_idle_device_is_lighter_than_flower_s_node_and_its_trainer_stays_warm(
    server: Server, tmp_path: Path, undisturbed: list[str]
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        found = ended(server, submit(server, trivial(TWO, LONG)))
        rss = [psutil.Process(device.process.pid).memory_info().rss for device in devices]
        [trainer] = trainers(devices[0])
        [started] = [line for line in devices[0].log.splitlines() if "online" in line]
    assert hashes(found) == undisturbed
    assert max(rss) < STOCK_SUPERNODE * 0.75, rss
    assert trainer.pid
    assert started
    later = [record["seconds"] for record in found["rounds"][2:]]
    trained = [sent["seconds"] for record in found["rounds"][2:] for sent in record["client_records"]]
    assert sorted(later)[len(later) // 2] - max(trained) < 2.5


@pytest.mark.parametrize("moment", ["waiting", "training", "answering"])
def test_a_device_that_is_killed_goes_on_where_it_was(
    server: Server, tmp_path: Path, undisturbed: list[str], moment: str
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        device = devices[1]
        folder = device.home / "device"
        until(lambda: state(device) == "online")
        if moment == "waiting":
            device.process.kill()
        run = submit(server, trivial(TWO, LONG))
        if moment == "training":
            until(lambda: state(device) == "training")
            device.process.kill()
        if moment == "answering":
            until(lambda: (folder / "answer").exists())
            device.process.kill()
            assert (folder / "order").exists()
        device.process.wait()
        device.again()
        found = ended(server, run)
    assert (found["status"], found["reason"]) == ("completed", "")
    assert statuses(found) == {"merged"}
    assert hashes(found) == undisturbed


def test_a_device_that_is_killed_before_its_order_is_on_its_disk_gets_it_again(
    server: Server, tmp_path: Path, undisturbed: list[str]
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        device = devices[1]
        until(lambda: state(device) == "online")
        device.process.kill()
        device.process.wait()
        command = [sys.executable, "-c", DIES_WITH_AN_ORDER_IN_HAND, "device", "join", "--data", device.source]
        planted = subprocess.Popen(command, env={**os.environ, "FEDTUNE_HOME": str(device.home)})
        run = submit(server, trivial(TWO, LONG, "federation.quorum=2", "federation.deadline=60"))
        assert planted.wait(60) == -signal.SIGKILL
        assert not (device.home / "device" / "order").exists()
        device.again()
        found = ended(server, run)
    assert statuses(found) == {"merged"}
    assert hashes(found) == undisturbed


def test_a_dead_device_is_given_no_place_in_a_new_run(server: Server, tmp_path: Path, undisturbed: list[str]) -> None:
    def there() -> list[str]:
        with server.operator() as connection:
            return [one["name"] for one in connection.request_json("GET", "devices")["devices"] if one["online"]]

    with joined(server, tmp_path, "partition:0", "partition:0", "partition:1") as devices:
        until(lambda: len(there()) == 3)
        devices[0].process.kill()
        devices[0].process.wait()
        until(lambda: there() == ["device-1", "device-2"], 60)
        found = ended(server, submit(server, trivial(TWO, LONG)))
    assert [one["device_name"] for one in found["assignments"]] == ["device-1", "device-2"]
    assert hashes(found) == undisturbed


def test_a_trainer_that_is_killed_costs_time_and_nothing_else(
    server: Server, tmp_path: Path, undisturbed: list[str]
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        run = submit(server, trivial(TWO, LONG))
        until(lambda: state(devices[0]) == "training")
        until(lambda: bool(trainers(devices[0])))
        trainers(devices[0])[0].kill()
        at_round(server, run, 2)
        trainers(devices[1])[0].kill()
        found = ended(server, run)
    assert statuses(found) == {"merged"}
    assert hashes(found) == undisturbed


def test_a_line_that_is_cut_and_slow_loses_nothing(server: Server, tmp_path: Path, undisturbed: list[str]) -> None:
    with (
        linked(server.place.settings.address) as link,
        joined(server, tmp_path, "partition:0", "partition:1") as devices,
    ):
        _through(devices[0], link.port)
        run = submit(server, trivial(TWO, LONG))
        until(lambda: state(devices[0]) == "training")
        link.cut()
        until(lambda: "the server cannot be reached" in devices[0].log)
        link.mend()
        at_round(server, run, 1)
        link.delay = 0.15
        found = ended(server, run)
        said = devices[0].log
    assert statuses(found) == {"merged"}
    assert hashes(found) == undisturbed
    assert said.count("the server cannot be reached") == 1
    assert "the server replies again" in said


def test_a_clock_that_is_a_month_behind_does_not_matter(
    server: Server, tmp_path: Path, undisturbed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        (tmp_path / "skewed").mkdir()
        (tmp_path / "skewed" / "sitecustomize.py").write_text(SKEWED)
        devices[0].process.terminate()
        devices[0].process.wait()
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "skewed"), *filter(None, sys.path)]))
        devices[0].again()
        found = ended(server, submit(server, trivial(TWO, LONG)))
    assert statuses(found) == {"merged"}, devices[0].log
    assert hashes(found) == undisturbed


def test_a_full_disk_costs_a_device_its_safety_and_not_the_round(
    server: Server, tmp_path: Path, undisturbed: list[str]
) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        device = devices[0]
        device.process.terminate()
        device.process.wait()
        read, write = os.pipe()
        device.process = _with_a_full_disk(device, write)
        found = ended(server, submit(server, trivial(TWO, LONG)))
        device.process.terminate()
        device.process.wait()
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
    assert statuses(found) == {"merged"}
    assert hashes(found) == undisturbed
    assert "going on without" in said


def test_a_budget_that_is_too_small_is_told_as_declined_and_the_others_go_on(server: Server, tmp_path: Path) -> None:
    with joined(server, tmp_path, "partition:0", "partition:1") as devices:
        device = devices[1]
        device.process.terminate()
        device.process.wait()
        command = [
            sys.executable,
            "-m",
            "fedtune.cli.main",
            "device",
            "join",
            "--data",
            "partition:1",
            "--memory",
            "60MB",
        ]
        device.process = subprocess.Popen(command, env={**os.environ, "FEDTUNE_HOME": str(device.home)})
        found = ended(server, submit(server, trivial(TWO, LONG)))
    assert found["status"] == "completed"
    told = [sent for record in found["rounds"] for sent in record["client_records"] if sent["client"] == 1]
    assert {sent["status"] for sent in told[1:]} == {"declined"}
    assert "60 MB this device allows" in told[-1]["reason"]


def test_a_device_that_was_stopped_is_offline_at_once(server: Server, tmp_path: Path) -> None:
    with joined(server, tmp_path, "partition:0") as [device]:
        until(lambda: state(device) == "online")
        with server.operator() as connection:
            assert connection.request_json("GET", "devices")["devices"][0]["online"]
            device.process.send_signal(signal.SIGTERM)
            assert device.process.wait(20) == 130
            assert not connection.request_json("GET", "devices")["devices"][0]["online"]


def test_enrolment_holds_against_false_servers_and_used_tokens(server: Server, tmp_path: Path) -> None:
    token = EnrolmentToken.parse_token(server.token("one"))
    home = DeviceHome(tmp_path / "one" / "device")
    with pytest.raises(DeviceError, match="not the server that this token is from"):
        enrol_device(home, None, EnrolmentToken(token.url, "0" * 64, token.secret), None)
    with pytest.raises(DeviceError, match="not an https:// address"):
        enrol_device(home, server.url.replace("https", "http"), token, None)
    with pytest.raises(DeviceError, match="cannot be reached"):
        enrol_device(home, "https://127.0.0.1:1", token, None)
    with pytest.raises(DeviceError, match="the token is incomplete"):
        EnrolmentToken.parse_token(server.token("two")[:-9])
    assert not home.folder.exists(), "nothing stays of what failed"
    identity = enrol_device(home, None, token, None)
    assert (identity.name, home.read_identity()) == ("one", identity)
    with pytest.raises(DeviceError, match="leave first"):
        enrol_device(home, None, token, None)
    other = DeviceHome(tmp_path / "other" / "device")
    with pytest.raises(DeviceError, match="used already"):
        enrol_device(other, None, token, "other")
    assert not other.folder.exists()
    assert "PRIVATE" not in json.dumps([line.message for line in server.audit()])


def _through(device: Device, port: int) -> None:
    """Let a device reach its server by another line."""
    device.process.terminate()
    device.process.wait()
    path = device.home / "device" / "identity.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps({**identity, "url": f"https://127.0.0.1:{port}"}))
    (device.home / "said").write_text("")
    device.again()


def _with_a_full_disk(device: Device, output: int) -> "subprocess.Popen[bytes]":
    """A device none of whose files can grow beyond a hundred bytes."""
    command = [sys.executable, "-m", "fedtune.cli.main", "device", "join", "--data", device.source]
    return subprocess.Popen(
        command,
        env={**os.environ, "FEDTUNE_HOME": str(device.home)},
        stdout=output,
        stderr=output,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
