"""One line of the check of a plug-in."""

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

from fedtune.errors import FedtuneError

__all__ = ["CheckResult", "require", "run_check"]


class CheckResult(NamedTuple):
    """What was checked, and how it ended; ``reason`` says why it failed or was skipped."""

    status: Literal["ok", "failed", "skipped"]
    what: str
    reason: str = ""


class _CheckFailedError(Exception):
    """What was checked does not hold."""


def require(holds: bool, otherwise: str) -> None:
    """End a check as failed unless a condition holds."""
    if not holds:
        raise _CheckFailedError(otherwise)


def run_check(
    what: str, check: Callable[[], object], refusal: type[FedtuneError] | tuple[type[FedtuneError], ...] = ()
) -> CheckResult:
    """Run a check. Any error, which a plug-in may raise, is a failure with its reason; a ``refusal`` skips it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except refusal as error:
        return CheckResult("skipped", what, str(error))
    except (FedtuneError, _CheckFailedError) as error:
        return CheckResult("failed", what, str(error))
    except Exception as error:
        return CheckResult("failed", what, " ".join(f"{type(error).__name__}: {error}".split()))
    return CheckResult("ok", what)
