"""Requests of devices to fedtune itself: enrolment, the server's time, and their profile."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.requests import Request

from fedtune.errors import ServerError, StoreError
from fedtune.flower.control_client import ControlClient
from fedtune.server.credentials import hash_secret
from fedtune.server.gateway.authentication import Authenticator, get_remote_address
from fedtune.server.gateway.refusal import AuditLog, RequestRefusedError
from fedtune.server.profile import read_profile
from fedtune.tracking import Access
from fedtune.untrusted import clean_text

__all__ = ["DeviceApi", "check_name"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class DeviceApi:
    """The gateway's API for devices. ``control`` returns a connection to the SuperLink."""

    access: Access
    guard: Authenticator
    audit: AuditLog
    control: Callable[[], ControlClient]
    ca: str

    def get_server_time(self, _: Request, __: Any) -> dict[str, Any]:
        """Return the server's time in seconds. Devices use it in their signatures."""
        return {"unix": time.time()}

    def enrol_device(self, request: Request, sent: Any) -> dict[str, Any]:
        """Use a token and register the device's key; raise RequestRefusedError if one of them is invalid."""
        secret, name, public_key = (_text(sent, field) for field in ("secret", "name", "public_key"))
        key = _pem(public_key)
        try:
            meant = self.access.use_enrolment_token(hash_secret(secret))
        except StoreError as error:
            raise RequestRefusedError(403, str(error)) from error
        try:
            node = self._register(meant or name, key, self.access.get_token_tags(hash_secret(secret)))
        except (RequestRefusedError, ServerError, StoreError):
            self.access.restore_token(hash_secret(secret))
            raise
        self.audit.record_action(get_remote_address(request), f"device {meant or name} enrolled")
        return {"node_id": str(node), "name": meant or name, "ca": self.ca}

    def _register(self, name: str, key: str, tags: Sequence[str]) -> int:
        check_name(name)
        if self.access.find_device(name) is not None:
            raise RequestRefusedError(
                409, f"there is a device {name!r} already; choose another name, or ask the operator to remove it"
            )
        node = self.control().register_node(key.encode(), name)
        self.access.add_device(name=name, node_id=str(node), public_key=key, tags=tags)
        self.guard.clear_device_cache()
        return node

    def save_profile(self, request: Request, sent: Any) -> dict[str, Any]:
        """Save the profile of a device: counts and sizes, never examples."""
        name = self.guard.authenticate_device(request)
        self.access.save_device_profile(name, read_profile(sent, name))
        return {"name": name}


def check_name(name: str) -> None:
    """Raise RequestRefusedError for an invalid device name."""
    if not _NAME.fullmatch(name):
        rule = "use at most 64 small letters, digits, '.', '_' and '-', beginning with a letter or a digit"
        raise RequestRefusedError(400, f"{clean_text(name)!r} is not a valid device name; {rule}")


def _text(sent: Any, field: str) -> str:
    value = sent.get(field) if isinstance(sent, dict) else None
    if not isinstance(value, str) or len(value) > 4096:
        raise RequestRefusedError(400, f"the request has no text field {field!r}; update the device's fedtune")
    return value


def _pem(text: str) -> str:
    """Convert a public key from OpenSSH format to PEM, which the SuperLink uses."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RequestRefusedError(400, "the device's key is not an OpenSSH public key; enroll again") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise RequestRefusedError(
            400, "the device's key is not an EC P-384 key; enroll again with fedtune device enrol"
        )
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
