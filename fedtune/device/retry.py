"""The retry loop repeats a call until the server replies, whatever happens to the server or the network."""

import ssl
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from fedtune.device.backoff import Backoff
from fedtune.errors import UnexpectedReplyError
from fedtune.untrusted import clean_text

__all__ = ["RECOVERED_MESSAGE", "RetryLoop", "unreachable"]

Result = TypeVar("Result")
RECOVERED_MESSAGE = "the server replies again"
_STRANGER = 401


class RetryLoop:
    """``say`` receives one line when a problem starts and one when it ends.

    ``reset_clock`` is called when the server replies with status 401, because a wrong clock makes signatures invalid.
    """

    def __init__(self, say: Callable[[str], None], reset_clock: Callable[[], None]) -> None:
        self._say, self._reset_clock = say, reset_clock
        self.last_error = ""

    def call_until_success(self, call: Callable[[], Result]) -> Result:
        """Return the result of the first successful call. Other errors than those of server and network are raised."""
        backoff = Backoff()
        while True:
            try:
                result = call()
            except httpx.HTTPStatusError as error:
                self._have(_refusal(error.response))
                if error.response.status_code == _STRANGER:
                    self._try_clock()
            except httpx.RequestError as error:
                self._have(unreachable(error))
            except UnexpectedReplyError:
                self._have("the reply does not come from a fedtune server; check its address and both versions")
            else:
                self._be_rid()
                return result
            time.sleep(backoff.choose_delay())

    def _try_clock(self) -> None:
        try:
            self._reset_clock()
        except (httpx.HTTPError, UnexpectedReplyError):
            return

    def _have(self, trouble: str) -> None:
        if trouble != self.last_error:
            self._say(f"{trouble}; trying again until it works")
        self.last_error = trouble

    def _be_rid(self) -> None:
        if self.last_error:
            self._say(RECOVERED_MESSAGE)
        self.last_error = ""


def unreachable(error: BaseException) -> str:
    """Explain why there is no connection. An invalid certificate is named, because a retry does not help then."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return "the server cannot be reached"
    return (
        f"the server's certificate is not valid ({clean_text(cause.verify_message, 120)}); on the server: fedtune "
        "server init --hostname NAME, then fedtune server up again"
    )


def _refusal(response: httpx.Response) -> str:
    if response.status_code == _STRANGER:
        return "the server does not know this device: it was removed, or another server is there now"
    if response.is_server_error:
        return f"the server has an internal problem (HTTP {response.status_code})"
    return f"the server refuses (HTTP {response.status_code}): {clean_text(response.text)}"
