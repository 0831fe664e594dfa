"""Authenticate the sender of a request: an operator by a key, or an enrolled device by a signature."""

import hmac
from base64 import b64decode
from binascii import Error as NotBase64
from datetime import datetime
from threading import Lock

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import verify_signature
from starlette.requests import Request

from fedtune.server.credentials import hash_secret
from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.server.operator_files import Role, allows
from fedtune.tracking import Access

__all__ = ["Authenticator", "get_remote_address"]

_BEARER = "Bearer "


class Authenticator:
    """Authenticates operators and devices."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = Lock()
        self._keys: dict[str, str] = {}

    def authenticate_operator(self, request: Request, needed: Role) -> str:
        """Return the name of the operator whose key is in a request.

        Raise RequestRefusedError if the key is unknown or the operator's role does not allow the request.
        """
        header = request.headers.get("authorization", "")
        shown = hash_secret(header.removeprefix(_BEARER)) if header.startswith(_BEARER) else ""
        found = [one for one in self._access.list_operators() if hmac.compare_digest(one.key_sha256, shown)]
        if not found:
            claim = "an unknown key" if shown else "no operator key"
            raise RequestRefusedError(
                401,
                f"{request.url.path} needs an operator's key, but the request has {claim}; see fedtune submit --help",
            )
        if not allows(found[0].role, needed):
            raise RequestRefusedError(
                403,
                f"operator {found[0].name} has the role {found[0].role}, and {request.url.path} needs {needed}; ask an "
                "admin for another key",
                found[0].name,
            )
        return found[0].name

    def identify_device(self, request: Request) -> str:
        """Return the name of the enrolled device whose key a request names; raise RequestRefusedError if there is none.

        This does not check the signature. The SuperLink checks it, or ``authenticate_device`` here.
        """
        key = _key(request)
        with self._lock:
            if key not in self._keys:
                self._keys = {found.public_key: found.name for found in self._access.list_devices()}
            name = self._keys.get(key)
        if name is None:
            raise RequestRefusedError(
                401, "this device is not enrolled here; ask the operator for a token and enroll it"
            )
        return name

    def authenticate_device(self, request: Request) -> str:
        """Return the name of the enrolled device that signed a request within the last minutes.

        Raise RequestRefusedError if the signature is wrong or too old.
        """
        name = self.identify_device(request)
        try:
            moment = request.headers[TIMESTAMP_HEADER]
            signature = b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            age = (now() - datetime.fromisoformat(moment)).total_seconds()
            public = serialization.load_pem_public_key(_key(request).encode())
            good = isinstance(public, ec.EllipticCurvePublicKey) and verify_signature(
                public, moment.encode(), signature
            )
        except (KeyError, ValueError, TypeError, NotBase64):
            good, age = False, 0.0
        if not good:
            raise RequestRefusedError(
                401, "the request is not signed with the device's key; enroll the device again", name
            )
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            raise RequestRefusedError(
                401, f"the request was signed {age:.0f} s ago by this server's clock; set the clocks", name
            )
        return name

    def clear_device_cache(self) -> None:
        """Read the enrolled devices from the store again at the next request."""
        with self._lock:
            self._keys = {}


def get_remote_address(request: Request) -> str:
    """Return the address that a request comes from, for the audit log."""
    return request.client.host if request.client else "unknown"


def _key(request: Request) -> str:
    try:
        return b64decode(request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""), validate=True).decode()
    except (ValueError, NotBase64):
        return ""
