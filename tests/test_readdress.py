"""A server whose address has changed, and the devices that go with it."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from fedtune.cli.device import device
from fedtune.cli.main import cli
from fedtune.device.device_home import DeviceHome, DeviceIdentity
from fedtune.device.enrolment import move_device
from fedtune.errors import DeviceError, FedtuneError
from fedtune.server import certificate_authority
from fedtune.server.credentials import hash_secret
from fedtune.server.operator_files import write_operator_file
from fedtune.server.server_home import ServerHome, create_server_home, open_server_home
from fedtune.tracking import Store


def init(*options: str) -> Result:
    return CliRunner().invoke(cli, ["server", "init", *options])


def settings(place: ServerHome) -> str:
    return (place.folder / "server.yaml").read_text()


@pytest.fixture
def place(home: Path) -> ServerHome:
    assert init("--name", "old.example", "--listen", "0.0.0.0:8443").exit_code == 0
    return open_server_home()


def test_init_again_changes_the_address_and_nothing_else(place: ServerHome) -> None:
    kept = {path: path.read_bytes() for path in (place.ca_file, place.ca_key_file, place.key_file)}
    key, before = json.loads(place.operator_file.read_text())["key"], settings(place)
    done = init("--name", "new.example", "--name", "10.0.0.7", "--listen", "0.0.0.0:9443")
    assert done.exit_code == 0, done.output
    assert "fedtune device move https://new.example:9443" in done.output
    moved = open_server_home()
    assert moved.settings.hostnames == ["new.example", "10.0.0.7", "old.example"]
    assert moved.settings.get_public_url() == "https://new.example:9443"
    assert {path: path.read_bytes() for path in kept} == kept
    told = json.loads(moved.operator_file.read_text())
    assert (told["url"], told["key"]) == ("https://new.example:9443", key)
    with Store.open() as store:
        assert [(one.name, one.key_sha256) for one in store.access.list_operators()] == [("local", hash_secret(key))]
    changed = [line for line in settings(moved).splitlines() if line not in before.splitlines()]
    assert changed == ['listen: "0.0.0.0:9443"', 'hostnames: ["new.example", "10.0.0.7", "old.example"]']
    assert settings(moved).count("#") == before.count("#"), "comments stay"


def test_init_again_without_an_address_or_with_one_that_is_none_changes_nothing(place: ServerHome) -> None:
    before = {path: path.read_bytes() for path in place.folder.iterdir() if path.is_file()}
    for options, words in (
        ((), "is a server's home already; change its address with --hostname or --listen"),
        (("--name", "a" * 300), "neither a host name nor an address"),
        (("--listen", "nowhere"), "listen is 'nowhere'"),
    ):
        done = init(*options)
        assert isinstance(done.exception, FedtuneError)
        assert words in str(done.exception)
    assert {path: path.read_bytes() for path in place.folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "text",
    [
        "hostnames:\n  - old.example\n  - other.example   # the second\n\n# how long\ndefault_deadline: 60\n"
        "listen: 0.0.0.0:1\n",
        "listen: '0.0.0.0:1'\nhostnames: [old.example,\n  other.example]\ndefault_deadline: 60",
        "default_deadline: 60\nhostnames: [old.example, other.example]",
        "# all defaults but one\ndefault_deadline: 60\n",
        "names:\n  - old.example\n  - other.example   # the second\n\n# how long\ndeadline: 60\nlisten: 0.0.0.0:1\n",
        "# of an earlier fedtune\n'deadline': 60\n",
    ],
)
def test_settings_in_any_form_of_yaml_are_changed_in_place(place: ServerHome, text: str) -> None:
    (place.folder / "server.yaml").write_text(text)
    before = open_server_home().settings
    assert init("--name", "new.example").exit_code == 0
    now = open_server_home().settings
    assert now == before.model_copy(update={"hostnames": ["new.example", *before.hostnames]})
    assert settings(place).count("#") == text.count("#")
    assert yaml.safe_load(settings(place))["default_deadline"] == 60


def test_settings_that_cannot_be_changed_in_place_are_left_alone(place: ServerHome) -> None:
    text = "listen: &where '0.0.0.0:1'\nhostnames: [old.example]\nstore: *where\n"
    (place.folder / "server.yaml").write_text(text)
    done = init("--listen", "0.0.0.0:2")
    assert "cannot be changed automatically; change listen and hostnames in it" in str(done.exception)
    assert settings(place) == text


class Time(BaseHTTPRequestHandler):
    """Answers every request with the time."""

    def do_GET(self) -> None:
        body = b'{"unix": 1700000000.0}' if self.path == "/fedtune/time" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def answering(place: ServerHome) -> Iterator[int]:
    """The port of a server that shows the home's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place.certificate_file, place.key_file)
    with HTTPServer(("127.0.0.1", 0), Time) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def moving(place: ServerHome) -> DeviceHome:
    made = DeviceHome()
    made.save_identity(DeviceIdentity("https://old.example:8443", "pi", 7, place.ca_file.read_text()))
    return made


def test_a_device_moves_with_its_server_and_keeps_who_it_is(place: ServerHome, moving: DeviceHome) -> None:
    with answering(place) as port:
        done = CliRunner().invoke(device, ["move", f"https://localhost:{port}/"], catch_exceptions=False)
    assert f"pi reaches its server at https://localhost:{port}\n" in done.output
    assert moving.read_identity() == DeviceIdentity(f"https://localhost:{port}", "pi", 7, place.ca_file.read_text())


def test_a_device_does_not_move_to_another_server_or_to_an_address_the_certificate_is_not_for(
    place: ServerHome, moving: DeviceHome, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = moving.read_identity()
    with pytest.raises(DeviceError, match="not an https:// address"):
        move_device(moving, "localhost:8443")
    with pytest.raises(DeviceError, match="cannot be reached"):
        move_device(moving, "https://localhost:1")
    monkeypatch.setenv("FEDTUNE_HOME", str(home / "other"))
    other = create_server_home(["localhost"], "127.0.0.1:8443")
    with answering(other) as port, pytest.raises(DeviceError, match="certificate is not valid"):
        move_device(moving, f"https://localhost:{port}")
    with moving.hold_lock(), pytest.raises(DeviceError, match="stop that process first"):
        move_device(moving, "https://localhost:1")
    assert moving.read_identity() == before


def test_an_operators_file_of_this_machine_is_made_for_the_new_address_only_if_there_is_one(place: ServerHome) -> None:
    place.operator_file.unlink()
    assert init("--name", "new.example").exit_code == 0
    assert not place.operator_file.exists()
    with Store.open() as store:
        write_operator_file(open_server_home(), store.access, "local", place.operator_file)
    assert json.loads(place.operator_file.read_text())["url"] == "https://new.example:8443"
    certificate, names = place.certificate_file.read_bytes(), ["new.example", "old.example"]
    assert certificate_authority.is_certificate_valid_for(
        certificate, names, certificate_authority.ends(certificate).replace(year=2000)
    )
