"""What the address of a run's page asks for: ``/runs/ID?colour=loss&order=problems&from=61&problems=2``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self
from urllib.parse import quote, urlencode

from fedtune.web.client_grid import COLOURS, ORDERS
from fedtune.web.page_error import PageError

__all__ = ["RunQuery"]

_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class RunQuery:
    """The grid's colours, order, first round (0: the newest rounds), device class, and the page of problems."""

    run_id: str
    colour: str = "status"
    order: str = ""
    start: int = 0
    device_class: str | None = None
    problems: int = 1

    @classmethod
    def parse(cls, run_id: str, given: Mapping[str, str]) -> Self:
        """Read the parameters of an address; PageError of status 400 for a value that is not understood."""
        return cls(
            run_id=run_id,
            colour=_choose(given, "colour", ("status", *COLOURS), "status"),
            order=_choose(given, "order", tuple(ORDERS), ""),
            start=_read_number(given, "from", 0),
            device_class=given.get("class"),
            problems=_read_number(given, "problems", 1),
        )

    def change(self, part: str, **changes: Any) -> str:
        """Return the address with some values changed; ``part`` is the section to show."""
        return f"{replace(self, **changes).url}#{part}"

    @property
    def url(self) -> str:
        """The address, without what is the default."""
        names = {"start": "from", "device_class": "class"}
        usual = asdict(RunQuery(run_id=self.run_id))
        given = {names.get(key, key): value for key, value in asdict(self).items() if value != usual[key]}
        return f"/runs/{quote(self.run_id, safe='')}" + (f"?{urlencode(given)}" if given else "")


def _choose(given: Mapping[str, str], key: str, known: tuple[str, ...], usual: str) -> str:
    value = given.get(key) or usual
    if value and value not in known:
        raise PageError(400, f"{value[:40]!r} is no {key}; write one of {', '.join(known)}.")
    return value


def _read_number(given: Mapping[str, str], key: str, usual: int) -> int:
    text = given.get(key) or str(usual)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and usual <= int(text) <= _LARGEST):
        raise PageError(400, f"{text[:20]!r} is no number for {key}; write one from {usual}.")
    return int(text)
