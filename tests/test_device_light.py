"""What a device's own process may import and how it behaves towards a server that misbehaves, without a server."""

import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP

from fedtune.cli.device import device
from fedtune.device.backoff import Backoff, choose_poll_delay
from fedtune.device.device_home import DeviceHome, DeviceIdentity
from fedtune.device.retry import RECOVERED_MESSAGE, RetryLoop
from fedtune.device.server_client import fetch_server_time
from fedtune.device.server_clock import ServerClock
from fedtune.device.trainer_channel import Frame
from fedtune.errors import DeviceError, UnexpectedReplyError
from fedtune.flower import fleet_client
from fedtune.server import certificate_authority

CA = certificate_authority.make_ca_certificate(certificate_authority.generate_private_key()).decode()
REQUEST = httpx.Request("POST", "https://server/")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def _refused(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=REQUEST, response=httpx.Response(status, text="no", request=REQUEST))


def _raising(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def _identity(home: Path) -> DeviceHome:
    place = DeviceHome()
    place.create_key()
    place.save_identity(DeviceIdentity("https://127.0.0.1:1", "pi", 7, CA))
    return place


def test_the_process_of_a_device_imports_neither_torch_nor_what_comes_with_it() -> None:
    heavy = ("torch", "datasets", "transformers", "pydantic", "fastapi", "sqlalchemy", "fedtune.training")
    imports = "import sys, fedtune.device.join, fedtune.cli.device"
    script = f"{imports}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flower_s_number_for_a_run_that_has_ended_is_the_one_devices_know() -> None:
    assert fleet_client._RUN_HAS_ENDED == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
    assert API_ERROR_MAP[ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED].http_status_code == fleet_client._FORBIDDEN


def test_whatever_may_pass_is_tried_until_it_has_passed_and_said_once() -> None:
    said: list[str] = []
    clocks: list[int] = []
    persistence = RetryLoop(said.append, lambda: clocks.append(1))
    line = [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut")] * 5
    assert persistence.call_until_success(_raising(*line)) == "done"
    assert said == ["the server cannot be reached; trying again until it works", RECOVERED_MESSAGE]
    said.clear()
    assert (
        persistence.call_until_success(_raising(_refused(500), _refused(503), _refused(401), _refused(412))) == "done"
    )
    assert [sentence.split(";")[0].split(":")[0] for sentence in said] == [
        "the server has an internal problem (HTTP 500)",
        "the server has an internal problem (HTTP 503)",
        "the server does not know this device",
        "the server refuses (HTTP 412)",
        RECOVERED_MESSAGE,
    ]
    assert clocks == [1], "a stranger's clock may be wrong"


@pytest.mark.parametrize("error", [KeyError("order"), ValueError("a fault of ours"), TypeError("x")])
def test_what_is_not_about_the_line_comes_through(error: Exception) -> None:
    said: list[str] = []
    with pytest.raises(type(error)):
        RetryLoop(said.append, lambda: None).call_until_success(_raising(error))
    assert said == []


def test_an_answer_that_is_none_of_the_protocol_is_told_as_what_it_is() -> None:
    said: list[str] = []
    persistence = RetryLoop(said.append, lambda: None)
    assert (
        persistence.call_until_success(_raising(UnexpectedReplyError("no message"), httpx.TooManyRedirects("x")))
        == "done"
    )
    assert said[0] == (
        "the reply does not come from a fedtune server; check its address and both versions; "
        "trying again until it works"
    )


def test_a_certificate_that_does_not_hold_is_told_with_the_mend() -> None:
    refused = ssl.SSLCertVerificationError("certificate verify failed")
    refused.verify_message = "certificate has expired"
    error = httpx.ConnectError("failed")
    error.__cause__ = OSError()
    error.__cause__.__context__ = refused
    said: list[str] = []
    assert RetryLoop(said.append, lambda: None).call_until_success(_raising(error)) == "done"
    assert said[0].startswith("the server's certificate is not valid (certificate has expired); on the server: fedtune")


@pytest.mark.parametrize("told", ["{}", "[]", "nothing", '{"unix": "late"}', '{"unix": 1e300}', '{"unix": -5}',
                                  '{"unix": NaN}', '{"unix": null}'])  # fmt: skip
def test_a_time_that_is_none_is_no_time(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, text=told, request=REQUEST))
    with pytest.raises(UnexpectedReplyError):
        fetch_server_time("https://server", ssl.create_default_context())


def test_waits_grow_to_a_limit_and_differ() -> None:
    backoff = Backoff(1.0, 8.0)
    waits = [backoff.choose_delay() for _ in range(50)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, [1.0, 2.0, 4.0] + [8.0] * 47, strict=True))
    assert len(set(waits)) == 50
    backoff.reset()
    assert backoff.choose_delay() <= 1.0


def test_the_longer_no_order_came_the_seldomer_it_is_looked_for() -> None:
    assert [choose_poll_delay(waited) for waited in (0.0, 1.0, 2.5, 5.0, 20.0, 1e9)] == [
        0.25,
        0.25,
        0.25,
        0.5,
        2.0,
        2.0,
    ]
    looks, waited = 0, 0.0
    while waited < 20.0:
        waited += choose_poll_delay(waited)
        looks += 1
    assert looks < 35, "a wait of twenty seconds took eighty looks at four a second"


def test_the_clock_follows_the_server_and_not_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock(lambda: 5_000.0)
    clock.synchronise()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock.get_server_time() == pytest.approx(5_000.0, abs=1.0)


def test_a_frame_that_is_not_whole_is_told_apart() -> None:
    frame = Frame({"kind": "trained", "seconds": 0.1}, b"\x00deltas")
    content = b"".join(frame.pieces())
    assert Frame.decode(content) == frame
    for damaged in (b"", content[:10], content[:-1], content + b"x"):
        with pytest.raises(ValueError, match="frame"):
            Frame.decode(damaged)


def test_a_key_is_its_owner_s_alone_and_one_that_is_not_is_refused(home: Path) -> None:
    place = _identity(home)
    assert (place.folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert place.read_key().curve.name == "secp384r1"
    (place.folder / "key.pem").chmod(0o644)
    with pytest.raises(DeviceError, match="chmod 600"):
        place.read_key()


def test_an_answer_never_outlives_the_order_it_belongs_to(home: Path) -> None:
    place = _identity(home)
    place.save_pending("order", b"one")
    place.save_pending("answer", b"to one")
    place.clear_pending()
    assert place.read_pending("order") is None
    assert place.read_pending("answer") is None


def test_one_process_is_a_device_at_a_time(home: Path) -> None:
    place = _identity(home)
    with place.hold_lock():
        script = "from fedtune.device.device_home import DeviceHome\nwith DeviceHome().hold_lock(): pass"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "is joined by another process" in done.stderr
        assert place.is_joined
    assert not place.is_joined


def test_a_device_tells_its_status_and_leaves(home: Path) -> None:
    place = _identity(home)
    place.write_status({"state": "online", "trainer": None})
    shown = CliRunner().invoke(device, ["status", "--json"], catch_exceptions=False)
    assert '"state": "not joined"' in shown.output
    assert '"name": "pi"' in shown.output
    assert shown.exit_code == 1, "a script sees it too"
    with place.hold_lock():
        shown = CliRunner().invoke(device, ["status"], catch_exceptions=False)
        assert "online" in shown.output
        assert shown.exit_code == 0
        with pytest.raises(DeviceError, match="stop that process first"):
            CliRunner().invoke(device, ["leave"], catch_exceptions=False)
    CliRunner().invoke(device, ["leave"], catch_exceptions=False)
    assert not place.folder.exists()
    with pytest.raises(DeviceError, match="enrol first"):
        CliRunner().invoke(device, ["status"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("reviews.csv", "write csv:FILE"),
        ("csv:", "write csv:FILE"),
        ("hub:imdb", "write csv:FILE"),
        ("csv:nowhere.csv", "there is no nowhere.csv"),
        ("partition:one", "partitions are numbered"),
    ],
)
def test_data_that_cannot_be_is_refused_before_joining(home: Path, source: str, words: str) -> None:
    from fedtune.device.join import TrainerSettings, run_device
    from fedtune.errors import DataError

    with pytest.raises(DataError, match=words):
        run_device(_identity(home), TrainerSettings(source, 10**9, 60.0), print)


def test_an_amount_of_memory_is_read_or_refused(home: Path) -> None:
    done = CliRunner().invoke(device, ["package", "--data", "partition:0", "--memory", "lots"])
    assert done.exit_code == 2
    assert "write for example 512MB or 2GiB" in done.output
