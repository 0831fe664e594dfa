"""Certificates of a server that is up: made anew well before they end, and their end told."""

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
    """Looks after the certificate of ``place``; ``context`` is the door's, ``say`` hears what is new."""

    def __init__(self, place: ServerHome, context: ssl.SSLContext, say: Callable[[str], None]) -> None:
        self._place, self._context, self._say = place, context, say
        self._looked = time.monotonic()

    def look(self) -> None:
        """Twice a day: renew what ends soon, take it into use at the door, and tell of an end that nobody can move."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self.renew()

    def renew(self) -> None:
        """Renew the server's certificate where it ends soon; new connections get it at once."""
        before = self._place.certificate_file.read_bytes()
        try:
            renewed = self._place.renew_certificate()
        except (FedtuneError, OSError) as error:
            self._say(
                f"the certificate ends on {_day(certificate_authority.ends(before))} and cannot be made anew: {error}"
            )
            return
        if renewed:
            self._context.load_cert_chain(self._place.certificate_file, self._place.key_file)
            until = _day(certificate_authority.ends(self._place.certificate_file.read_bytes()))
            self._say(f"the server's certificate was made anew; it is good until {until}")
        for sentence in describe_authority_expiry(self._place):
            self._say(sentence)


def describe_authority_expiry(place: ServerHome) -> list[str]:
    """What is to be told of the authority, which only a new server's home can replace."""
    if (until := certificate_authority.ends_soon(place.ca_file.read_text())) is None:
        return []
    return [
        f"the server's authority ends on {_day(until)}, and with it every device's enrolment; before that, make a new "
        "home with fedtune server init in another FEDTUNE_HOME and enrol the devices there"
    ]


def _day(moment: datetime) -> str:
    return f"{moment:%d %b %Y}"
