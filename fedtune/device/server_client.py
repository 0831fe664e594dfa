"""A device's HTTPS calls to fedtune's own routes: the time, the CA certificate, enrolment and the profile."""

import ssl
from collections.abc import Mapping
from typing import Any

import httpx

from fedtune.errors import DeviceError, UnexpectedReplyError

__all__ = [
    "fetch_ca_certificate",
    "fetch_server_time",
    "make_tls_context",
    "request_enrolment",
    "send_profile",
]

_SECONDS = 20.0
_LAST_SECOND = 253_402_300_799.0
"""The last second of the year 9999, the largest that datetime can represent."""


def make_tls_context(ca: str) -> ssl.SSLContext:
    """Return a TLS context that trusts only this CA certificate, given as PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca)
    return context


def fetch_ca_certificate(url: str) -> str:
    """Return the server's CA certificate as PEM. It is not verified; the caller must compare its hash."""
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    return _call("GET", f"{url}/fedtune/ca", anyone).text


def request_enrolment(url: str, ca: str, request: Mapping[str, str]) -> dict[str, Any]:
    """Send the enrolment request, and return the server's reply as JSON."""
    answer: dict[str, Any] = _call("POST", f"{url}/fedtune/enroll", make_tls_context(ca), json=dict(request)).json()
    return answer


def fetch_server_time(url: str, context: ssl.SSLContext) -> float:
    """Return the server's time in seconds since 1970.

    Raise httpx's errors if the server cannot be reached, UnexpectedReplyError if the reply is not a time.
    """
    response = httpx.get(f"{url}/fedtune/time", verify=context, timeout=_SECONDS).raise_for_status()
    try:
        unix = float(response.json()["unix"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnexpectedReplyError(f"the reply of {url} is not a time") from error
    if not 0.0 <= unix <= _LAST_SECOND:
        raise UnexpectedReplyError(f"the time that {url} sent is not a date")
    return unix


def send_profile(url: str, context: ssl.SSLContext, headers: Mapping[str, str], profile: Mapping[str, Any]) -> None:
    """Send the profile of this device; raise httpx's errors if this fails."""
    httpx.post(
        f"{url}/fedtune/device/profile",
        verify=context,
        timeout=_SECONDS,
        headers=dict(headers),
        json=dict(profile),
    ).raise_for_status()


def _call(method: str, url: str, context: ssl.SSLContext, json: Mapping[str, str] | None = None) -> httpx.Response:
    try:
        with httpx.Client(verify=context, timeout=_SECONDS) as client:
            response = client.request(method, url, json=json)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DeviceError(f"{url} cannot be reached: {error}; check the address and that the server is up") from error
    if response.is_error:
        raise DeviceError(f"{url} refused: {_sentence(response)}")
    return response


def _sentence(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
