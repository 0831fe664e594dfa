"""Certificates that are made anew while a server is up, and what is told of their end."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedtune.device.device_home import DeviceIdentity
from fedtune.device.enrolment import describe_expiry
from fedtune.server import certificate_authority, certificates
from fedtune.server.certificates import Certificates, describe_authority_expiry
from fedtune.server.server_home import ServerHome, create_server_home, open_server_home


@contextmanager
def answering(place: ServerHome) -> Iterator[tuple[ssl.SSLContext, int]]:
    """A TLS server with the home's certificate that shakes hands with whoever comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place.certificate_file, place.key_file)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                with caller:
                    context.wrap_socket(caller, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        yield context, listener.getsockname()[1]


def shown(place: ServerHome, port: int) -> datetime:
    """When the certificate ends that the server shows."""
    trust = ssl.create_default_context(cadata=place.ca_file.read_text())
    with (
        socket.create_connection(("127.0.0.1", port)) as line,
        trust.wrap_socket(line, server_hostname="localhost") as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).not_valid_after_utc


def age(place: ServerHome, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """Make the server's certificate one that ends in so many days."""
    with monkeypatch.context() as patched:
        patched.setattr(certificate_authority, "_SERVER_DAYS", days)
        place.renew_certificate(force=True)


def test_a_certificate_is_renewed_while_the_server_is_up_and_shown_to_who_connects_next(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = create_server_home(["localhost"], "127.0.0.1:8443"), list[str]()
    age(place, monkeypatch, 50)
    with answering(place) as (context, port):
        before = shown(place, port)
        looking = Certificates(place, context, said.append)
        looking.look()
        assert shown(place, port) == before, "it looks twice a day"
        looking.renew()
        after = shown(place, port)
    assert after - before > timedelta(days=300)
    assert said == [f"the server's certificate was renewed; it is valid until {after:%d %b %Y}"]
    looking.renew()
    assert len(said) == 1


def test_a_certificate_that_cannot_be_made_anew_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, said = create_server_home(["localhost"], "127.0.0.1:8443"), list[str]()
    age(place, monkeypatch, 50)
    place.ca_key_file.unlink()
    Certificates(place, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), said.append).renew()
    [sentence] = said
    assert sentence.startswith("the certificate expires on ")
    assert "ca.key" in sentence


def test_the_end_of_the_authority_is_told_on_both_sides_and_no_certificate_outlives_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    now = datetime.now(UTC).timestamp()
    assert describe_authority_expiry(place) == []
    assert (
        describe_expiry(DeviceIdentity(place.settings.get_public_url(), "pi", 1, place.ca_file.read_text()), now) == ""
    )
    monkeypatch.setattr(certificate_authority, "_AUTHORITY_DAYS", 100)
    monkeypatch.setenv("FEDTUNE_HOME", str(home / "old"))
    old = create_server_home(["localhost"], "127.0.0.1:8443")
    until = certificate_authority.ends(old.ca_file.read_bytes())
    [sentence] = describe_authority_expiry(old)
    assert f"ends on {until:%d %b %Y}" in sentence
    told = describe_expiry(DeviceIdentity(old.settings.get_public_url(), "pi", 1, old.ca_file.read_text()), now)
    assert (
        told == f"the server's authority ends on {until:%d %b %Y}; before that, leave and enrol again with a new token"
    )
    assert certificate_authority.ends(old.certificate_file.read_bytes()) == until
    monkeypatch.setattr(certificates, "_LOOK_SECONDS", 0.0)
    assert not open_server_home().renew_certificate(), "what cannot be made longer is not made anew again and again"
