"""Signed requests are good for a while around the moment they were signed, and for nobody else."""

from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from starlette.requests import Request

from fedtune.flower.fleet_client import make_signed_headers
from fedtune.server.gateway import authentication
from fedtune.server.gateway.authentication import Authenticator
from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.tracking import Store

MOMENT = datetime(2026, 5, 4, 12, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP384R1())


@pytest.fixture
def at_the_door(home: Path) -> Iterator[Authenticator]:
    pem = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with Store.open() as store:
        store.access.add_device(name="dev", node_id="1", public_key=pem.decode())
        yield Authenticator(store.access)


def signed(**changed: str) -> Request:
    headers = make_signed_headers(KEY, MOMENT.timestamp()) | changed
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def asked(door: Authenticator, age: float, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(authentication, "now", lambda: MOMENT + timedelta(seconds=age))
    return door.authenticate_device(signed())


@pytest.mark.parametrize(
    "age", [-SYSTEM_TIME_TOLERANCE + 0.5, 0, TIMESTAMP_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE - 0.5]
)
def test_a_request_is_good_within_the_window(
    at_the_door: Authenticator, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(at_the_door, age, monkeypatch) == "dev"


@pytest.mark.parametrize(
    "age",
    [
        -86400,
        -SYSTEM_TIME_TOLERANCE - 0.5,
        -SYSTEM_TIME_TOLERANCE,
        TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE,
        TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE + 0.5,
        86400,
    ],
)
def test_a_request_is_refused_outside_the_window(
    at_the_door: Authenticator, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestRefusedError, match=f"signed {age:.0f} s ago") as refused:
        asked(at_the_door, age, monkeypatch)
    assert (refused.value.status, refused.value.actor) == (401, "dev")


@pytest.mark.parametrize("moment", ["2026-05-04T12:00:01+00:00", "2026-05-04T12:00:00", "now", ""])
def test_another_moment_than_the_signed_one_is_refused(
    at_the_door: Authenticator, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "now", lambda: MOMENT)
    with pytest.raises(RequestRefusedError, match="not signed with the device's key"):
        at_the_door.authenticate_device(signed(**{TIMESTAMP_HEADER: moment}))


def test_another_keys_signature_is_refused(at_the_door: Authenticator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "now", lambda: MOMENT)
    others = make_signed_headers(ec.generate_private_key(ec.SECP384R1()), MOMENT.timestamp())
    name = FLEET_HTTP_SIGNATURE_HEADER
    for signature in (others[name], b64encode(b"x").decode(), "no base64", ""):
        with pytest.raises(RequestRefusedError, match="not signed with the device's key"):
            at_the_door.authenticate_device(signed(**{name: signature}))
