"""Calls of a device to the server's own routes, beside Flower's: its time, its authority, enrolment, the profile."""

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
"""The last second of the year 9999, beyond which a time is no date."""


def make_tls_context(ca: str) -> ssl.SSLContext:
    """TLS that trusts one authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca)
    return context


def fetch_ca_certificate(url: str) -> str:
    """The certificate, as PEM, that a server says is its authority's: to be believed once its hash has been checked."""
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    return _call("GET", f"{url}/fedtune/ca", anyone).text


def request_enrolment(url: str, ca: str, request: Mapping[str, str]) -> dict[str, Any]:
    """What the server answers a device that shows its token's secret."""
    answer: dict[str, Any] = _call("POST", f"{url}/fedtune/enroll", make_tls_context(ca), json=dict(request)).json()
    return answer


def fetch_server_time(url: str, context: ssl.SSLContext) -> float:
    """Seconds since 1970 on the server; httpx's errors when it cannot be reached, UnexpectedReplyError for no time."""
    response = httpx.get(f"{url}/fedtune/time", verify=context, timeout=_SECONDS).raise_for_status()
    try:
        unix = float(response.json()["unix"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnexpectedReplyError(f"{url} does not tell the time") from error
    if not 0.0 <= unix <= _LAST_SECOND:
        raise UnexpectedReplyError(f"{url} tells a time that is no date")
    return unix


def send_profile(url: str, context: ssl.SSLContext, headers: Mapping[str, str], profile: Mapping[str, Any]) -> None:
    """Tell what this device is and holds; httpx's errors when it cannot be told."""
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
