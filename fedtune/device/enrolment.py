"""Enrol a device on a server: the device creates a key, sends a one-time token and receives a node number."""

import base64
import hashlib
import json
import re
import socket
import ssl
from dataclasses import dataclass, replace
from datetime import datetime

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.device.device_home import DeviceHome, DeviceIdentity
from fedtune.device.retry import unreachable
from fedtune.device.server_client import (
    fetch_ca_certificate,
    fetch_server_time,
    make_tls_context,
    request_enrolment,
)
from fedtune.errors import DeviceError, UnexpectedReplyError
from fedtune.untrusted import clean_text

__all__ = ["EnrolmentToken", "authority_ends", "describe_expiry", "enrol_device", "move_device"]

_SOON_SECONDS = 180 * 86_400.0
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class EnrolmentToken:
    """The URL to enrol at, the hexadecimal SHA-256 of the CA certificate in DER, and a secret that works once."""

    url: str
    ca_sha256: str
    secret: str

    @classmethod
    def parse_token(cls, text: str) -> "EnrolmentToken":
        """Parse the text that the operator passes on; raise DeviceError if it is incomplete."""
        try:
            padded = text.strip() + "=" * (-len(text.strip()) % 4)
            return cls(**json.loads(base64.urlsafe_b64decode(padded)))
        except (ValueError, TypeError) as error:
            raise DeviceError("the token is incomplete; copy all of it, or ask the operator for a new one") from error


def enrol_device(home: DeviceHome, url: str | None, token: EnrolmentToken, name: str | None) -> DeviceIdentity:
    """Create a key, send the public key and the token, and save the identity. After an error nothing remains."""
    if home.is_enrolled:
        raise DeviceError(f"{home.folder} holds device {home.read_identity().name} already; leave first")
    chosen, where = name or _own_name(), (url or token.url).rstrip("/")
    if not _NAME.fullmatch(chosen):
        raise DeviceError(f"a device cannot be called {chosen!r}; use small letters, digits, dots and dashes")
    ca = _checked_authority(where, token)
    try:
        key = home.create_key().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        answer = request_enrolment(where, ca, {"secret": token.secret, "name": chosen, "public_key": key})
        identity = DeviceIdentity(where, str(answer["name"]), int(answer["node_id"]), ca)
        home.save_identity(identity)
    except BaseException:
        home.delete_all()
        raise
    return identity


def move_device(home: DeviceHome, url: str) -> DeviceIdentity:
    """Save another address of the same server; raise DeviceError if another server replies, or none."""
    identity, where = home.read_identity(), url.rstrip("/")
    if home.is_joined:
        raise DeviceError(f"the device in {home.folder} is joined; stop that process first")
    if not where.startswith("https://"):
        raise DeviceError(f"{url} is not an https:// address; write e.g. https://192.168.1.20:8443")
    try:
        fetch_server_time(
            where, make_tls_context(identity.ca)
        )  # the TLS context accepts only certificates of this device's CA
    except httpx.RequestError as error:
        raise DeviceError(f"{where}: {unreachable(error)}") from error
    except (httpx.HTTPStatusError, httpx.InvalidURL, UnexpectedReplyError) as error:
        raise DeviceError(f"{where} is not a fedtune server: {clean_text(error)}; check the address") from error
    moved = replace(identity, url=where)
    home.save_identity(moved)
    return moved


def authority_ends(identity: DeviceIdentity) -> datetime:
    """Return when the server's CA certificate expires. The enrolment expires with it."""
    return x509.load_pem_x509_certificate(identity.ca.encode()).not_valid_after_utc


def describe_expiry(identity: DeviceIdentity, now: float) -> str:
    """Return a warning if the enrolment expires within half a year, otherwise an empty text.

    ``now`` is in seconds since 1970.
    """
    until = authority_ends(identity)
    if until.timestamp() > now + _SOON_SECONDS:
        return ""
    return f"the server's authority ends on {until:%d %b %Y}; before that, leave and enrol again with a new token"


def _own_name() -> str:
    return re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip("-._") or "device"


def _checked_authority(url: str, token: EnrolmentToken) -> str:
    if not url.startswith("https://"):
        raise DeviceError(f"{url} is not an https:// address; write https://, so that the connection is encrypted")
    ca = fetch_ca_certificate(url)
    try:
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca)).hexdigest()
    except ValueError as error:
        raise DeviceError(f"{url} is not a fedtune server: it sends no certificate; check the address") from error
    if found != token.ca_sha256:
        raise DeviceError(f"{url} is not the server that this token is from; do not enrol, and tell the operator")
    return ca
