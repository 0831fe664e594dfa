"""Renew the certificate of a running server well before it expires, and warn before the CA expires."""

import ssl
import time
from collections.abc import Callable
from datetime import datetime

from fedtune.errors import FedtuneError
from fedtune.server import certificate_authority
from fedtune.server.server_home import ServerHome

__all__ = ["Certificates", "describe_authority_expiry"]

_LOOK_SECONDS = 43_200.0


class Certificates:
    """Renews the certificate of a server home. ``context`` is the gateway's TLS context; ``say`` logs a sentence."""

    def __init__(self, place: ServerHome, context: ssl.SSLContext, say: Callable[[str], None]) -> None:
        self._place, self._context, self._say = place, context, say
        self._looked = time.monotonic()

    def look(self) -> None:
        """Call ``renew`` twice a day."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self.renew()

    def renew(self) -> None:
        """Renew the server's certificate if it expires soon. New connections use it at once."""
        before = self._place.certificate_file.read_bytes()
        try:
            renewed = self._place.renew_certificate()
        except (FedtuneError, OSError) as error:
            self._say(
                f"the certificate expires on {_day(certificate_authority.ends(before))} and cannot be renewed: {error}"
            )
            return
        if renewed:
            self._context.load_cert_chain(self._place.certificate_file, self._place.key_file)
            until = _day(certificate_authority.ends(self._place.certificate_file.read_bytes()))
            self._say(f"the server's certificate was renewed; it is valid until {until}")
        for sentence in describe_authority_expiry(self._place):
            self._say(sentence)


def describe_authority_expiry(place: ServerHome) -> list[str]:
    """Return a warning if the CA expires soon. Only a new server home can replace it."""
    if (until := certificate_authority.ends_soon(place.ca_file.read_text())) is None:
        return []
    return [
        f"the server's authority ends on {_day(until)}, and with it every device's enrolment; before that, make a new "
        "home with fedtune server init in another FEDTUNE_HOME and enrol the devices there"
    ]


def _day(moment: datetime) -> str:
    return f"{moment:%d %b %Y}"
