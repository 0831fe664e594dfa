"""An error of one page: what was asked, what is wrong, and what to do next."""

from dataclasses import dataclass

__all__ = ["PageError"]


@dataclass
class PageError(Exception):
    """A page that cannot be shown. ``problem`` is one sentence with its mend; ``status`` is the HTTP code."""

    status: int
    problem: str
