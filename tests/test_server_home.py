"""A server's home: what is made, what is refused, and certificates that TLS itself accepts."""

import json
import socket
import ssl
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from cryptography import x509

from fedtune.cli.main import cli
from fedtune.errors import FedtuneError, ServerError, StoreError
from fedtune.server import certificate_authority
from fedtune.server.credentials import generate_secret, hash_secret
from fedtune.server.gateway.refusal import AuditLog
from fedtune.server.operator_files import write_operator_file
from fedtune.server.server_home import create_server_home, open_server_home
from fedtune.tracking import Access, Assignment, Store


def handshake(ca: bytes, certificate: Path, key: Path, name: str) -> None:
    """A client that trusts ``ca`` connects to a server by a name; the client's error, if there is one."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            serving.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ssl.create_default_context(cadata=ca.decode()).wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


def test_init_makes_a_home_whose_files_are_the_owners_alone(home: Path) -> None:
    result = CliRunner().invoke(cli, ["server", "init", "--hostname", "lab.example", "--listen", "0.0.0.0:8443"])
    assert result.exit_code == 0, result.output
    place = open_server_home()
    assert place.settings.get_public_url() == "https://lab.example:8443"
    for path in (place.ca_key_file, place.key_file, place.operator_file):
        assert path.stat().st_mode & 0o777 == 0o600
    told = json.loads(place.operator_file.read_text())
    assert told["url"] == "https://lab.example:8443"
    with Store.open() as store:
        assert [(one.name, one.key_sha256, one.role) for one in store.access.list_operators()] == [
            ("local", hash_secret(told["key"]), "admin")
        ]


def test_a_second_init_changes_nothing_and_says_so(home: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    before = place.ca_file.read_bytes()
    with pytest.raises(ServerError, match="is a server's home already"):
        create_server_home(["localhost"], "127.0.0.1:8443")
    assert place.ca_file.read_bytes() == before


@pytest.mark.parametrize("name", ["lab.example", "10.1.2.3", "localhost", "127.0.0.1"])
def test_the_certificate_is_good_for_the_names_given_and_this_machine(home: Path, name: str) -> None:
    place = create_server_home(["lab.example", "10.1.2.3"], "127.0.0.1:8443")
    handshake(place.ca_file.read_bytes(), place.certificate_file, place.key_file, name)


def test_the_certificate_is_refused_for_another_name_and_by_who_trusts_another_authority(home: Path) -> None:
    place = create_server_home(["lab.example"], "127.0.0.1:8443")
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(place.ca_file.read_bytes(), place.certificate_file, place.key_file, "other.example")
    stranger = certificate_authority.make_ca_certificate(certificate_authority.generate_private_key())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stranger, place.certificate_file, place.key_file, "lab.example")


def test_a_new_name_in_the_settings_renews_the_certificate_but_nothing_else_does(home: Path) -> None:
    place = create_server_home(["lab.example"], "127.0.0.1:8443")
    before = place.certificate_file.read_bytes()
    place.renew_certificate()
    assert place.certificate_file.read_bytes() == before
    path = place.folder / "server.yaml"
    path.write_text(path.read_text().replace('["lab.example"]', '["lab.example", "new.example"]'))
    open_server_home().renew_certificate()
    handshake(place.ca_file.read_bytes(), place.certificate_file, place.key_file, "new.example")


def test_settings_are_commented_yaml_and_wrong_ones_are_told_in_a_sentence(home: Path) -> None:
    path = create_server_home(["localhost"], "127.0.0.1:8443").folder / "server.yaml"
    assert yaml.safe_load(path.read_text()) == {
        "listen": "127.0.0.1:8443",
        "hostnames": ["localhost"],
        "default_deadline": 3600,
        "body_limit": 1 << 26,
        "connections": 256,
    }
    path.write_text("listne: 127.0.0.1:1\n")
    with pytest.raises(ServerError, match=r"unknown key 'listne'; .*listen"):
        open_server_home()


def test_old_names_of_settings_are_read_and_one_line_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = create_server_home(["localhost"], "127.0.0.1:8443").folder / "server.yaml"
    open_server_home()
    assert capsys.readouterr().err == ""
    path.write_text('names: ["lab.example"]\ndeadline: 60\nconnections: 4\n')
    settings = open_server_home().settings
    assert (settings.hostnames, settings.default_deadline, settings.connections) == (["lab.example"], 60, 4)
    mend = "names is now hostnames, deadline is now default_deadline"
    assert capsys.readouterr().err == f"fedtune: {path} has old names of settings: {mend}\n"
    path.write_text("deadline: 60\ndefault_deadline: 70\n")
    with pytest.raises(ServerError, match="unknown key 'deadline'"):
        open_server_home()


def test_a_name_that_is_none_is_refused(home: Path) -> None:
    with pytest.raises(ServerError, match="neither a host name nor an address"):
        create_server_home(["a" * 300], "127.0.0.1:8443")


def test_up_says_that_it_starts_before_it_imports_what_it_needs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and Flower take seconds to import; the module that imports them is missing here."""
    monkeypatch.setitem(sys.modules, "fedtune.server.server_process", None)
    done = CliRunner().invoke(cli, ["server", "up"])
    assert isinstance(done.exception, ImportError)
    assert done.stderr == "fedtune server: starting; press Ctrl-C to stop it\n"


def test_no_server_is_told_with_the_mend(home: Path) -> None:
    with pytest.raises(ServerError, match="create one with fedtune server init"):
        open_server_home()


@pytest.fixture
def access(home: Path) -> Access:
    with Store.open() as store:
        return store.access


def test_a_token_that_has_expired_is_refused_and_not_spent(access: Access) -> None:
    access.add_token("a", "dev", hours=-1)
    with pytest.raises(StoreError, match="has expired"):
        access.use_enrolment_token("a")
    with pytest.raises(StoreError, match="is not known here"):
        access.use_enrolment_token("b")


def test_an_operators_new_file_makes_the_old_one_worthless(home: Path, access: Access, tmp_path: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    write_operator_file(place, access, "ada", tmp_path / "first.json")
    write_operator_file(place, access, "ada", tmp_path / "second.json")
    keys = [json.loads((tmp_path / name).read_text())["key"] for name in ("first.json", "second.json")]
    assert [(one.name, one.key_sha256) for one in access.list_operators()] == [("ada", hash_secret(keys[1]))]
    write_operator_file(place, access, "local", tmp_path / "third.json")
    access.remove_operator("ada")
    with pytest.raises(StoreError, match="no operator 'ada'"):
        access.remove_operator("ada")


def test_seats_leave_with_their_run_and_devices_stay(home: Path) -> None:
    with Store.open() as store:
        store.create_run(id="r", name="r", recipe="{}", seed=0, engine="devices", rounds_planned=1, status="queued")
        store.access.add_device(name="dev", node_id="18446744073709551615", public_key="pem")
        seats = [Assignment(client=0, device_name="dev", node_id="18446744073709551615")]
        store.access.assign_clients("r", seats)
        assert store.access.list_assignments("r") == seats
        assert store.run("r").status == "queued"
        assert [run.id for run in store.list_unfinished_runs("devices")] == ["r"]
        store.delete("r")
        assert store.access.list_assignments("r") == []
        assert [device.name for device in store.access.list_devices()] == ["dev"]
        with pytest.raises(StoreError, match="there is a device 'dev' already"):
            store.access.add_device(name="dev", node_id="1", public_key="pem")


def test_one_address_cannot_fill_the_audit(access: Access) -> None:
    audit = AuditLog(access)
    for _ in range(100):
        audit.record_refusal("10.0.0.1", "knocked")
    audit.record_refusal("10.0.0.2", "knocked too")
    lines = access.audit.list_lines(1000)
    assert len([line for line in lines if line.actor == "10.0.0.1"]) <= 61  # a minute may turn meanwhile, and is told
    assert lines[0].actor == "10.0.0.2"


def test_secrets_are_long_and_never_the_same() -> None:
    made = {generate_secret() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 43


def test_an_unreachable_server_and_a_bad_operators_file_are_told_in_a_sentence(home: Path, tmp_path: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:1")
    with Store.open() as store:
        write_operator_file(place, store.access, "local", place.operator_file)
    result = CliRunner().invoke(cli, ["runs", "watch"])
    assert isinstance(result.exception, ServerError)
    assert "is fedtune server up there?" in str(result.exception)
    (tmp_path / "bad.json").write_text("[]")
    result = CliRunner().invoke(cli, ["server", "create-token", "--operator-file", str(tmp_path / "bad.json")])
    assert isinstance(result.exception, FedtuneError)
    assert "is not an operator file" in str(result.exception)


def test_a_clock_that_was_never_set_finds_the_certificate_valid() -> None:
    key, other = certificate_authority.generate_private_key(), certificate_authority.generate_private_key()
    signer = certificate_authority.make_ca_certificate(key)
    for pem in (signer, certificate_authority.issue_server_certificate(key, signer, other, ["localhost"])):
        assert x509.load_pem_x509_certificate(pem).not_valid_before_utc <= datetime(1970, 1, 1, tzinfo=UTC)
