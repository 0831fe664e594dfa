"""What the address of the page of runs asks for: ``/runs?q=film&status=failed&sort=-started&page=2``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import urlencode

from fedtune.web.page_error import PageError

__all__ = ["SORT_KEYS", "STATUSES", "RunsQuery"]

STATUSES = ("running", "completed", "failed", "interrupted", "queued")
SORT_KEYS = ("status", "run", "seed", "rounds", "result", "time", "started")
_DESCENDING_FIRST = {"started", "result", "time", "rounds"}
_LONGEST = 200


@dataclass(frozen=True)
class RunsQuery:
    """The filters, the order and the page of the table. ``sort`` begins with ``-`` for descending."""

    q: str = ""
    status: tuple[str, ...] = ()
    sort: str = "-started"
    page: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """Read the parameters of an address; PageError of status 400 for a value that is not understood."""
        status = tuple(one for one in given.get("status", "").split(",") if one)
        sort, page = given.get("sort") or "-started", given.get("page") or "1"
        if unknown := [one for one in status if one not in STATUSES]:
            raise PageError(400, f"{unknown[0]!r} is no status of a run; write one of {', '.join(STATUSES)}.")
        if sort.removeprefix("-") not in SORT_KEYS:
            raise PageError(400, f"Runs cannot be sorted by {sort!r}; write one of {', '.join(SORT_KEYS)}.")
        if not _is_page(page):
            raise PageError(400, f"{page[:20]!r} is no page of the table; write a number from 1.")
        return cls(given.get("q", "").strip()[:_LONGEST], status, sort, int(page))

    @property
    def is_filtered(self) -> bool:
        """Whether the table may leave out runs."""
        return bool(self.q or self.status)

    def toggle_status(self, name: str) -> "RunsQuery":
        """Return the query with one status added, or removed if it was asked for."""
        others = tuple(one for one in self.status if one != name)
        return replace(self, status=others if name in self.status else (*others, name), page=1)

    def sort_by(self, key: str) -> "RunsQuery":
        """Return the query sorted by a column; by the column it is sorted by already, in the other direction."""
        usual, other = (f"-{key}", key) if key in _DESCENDING_FIRST else (key, f"-{key}")
        return replace(self, sort=other if self.sort == usual else usual, page=1)

    def turn_to(self, page: int) -> "RunsQuery":
        """Return the query for another page of the table."""
        return replace(self, page=page)

    @property
    def url(self) -> str:
        """The address, without what is the default."""
        every = {"q": self.q, "status": ",".join(self.status), "sort": self.sort, "page": str(self.page)}
        given = {key: value for key, value in every.items() if value and (key, value) not in _DEFAULTS}
        return f"/runs?{urlencode(given)}" if given else "/runs"


_DEFAULTS = {("sort", "-started"), ("page", "1")}


def _is_page(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0
